"""What a reproduction runs: its options, the trainings of its grid, and the sweeps after them."""

import itertools
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.parsing import check_file
from recurrent_drafter.data.sources import DATASET_NAMES, HAVE_EVALUATION_SET, Split
from recurrent_drafter.records.paths import check_model
from recurrent_drafter.training.options import Method, check_least, option

Scope = Literal["full", "assistant"]

METHODS: dict[Method, str] = {
    "ground_truth": "ground truth",
    "knowledge_distillation": "knowledge distillation",
    "distilled": "distilled targets",
}
SCOPES: dict[Scope, str] = {"full": "whole conversations", "assistant": "replies only"}
DEPTHS = 5  # tokens ahead that every method learns: the paper's number of distilled tokens
CALIBRATION = "calibration"  # the job that finds out how many steps fit into --cell_seconds
CURVE = 5  # evaluations of a training whose length was found by calibration
SWEEPS = ("shapes", "tree", "vocabulary")

QUICK_FLAGS = (
    "--learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 10 --adam_beta2 0.98 --logging_steps 10 "
    "--model_max_length 256"
)


def _settled(text: str, whole: Any, quick: Any, said: str | None = None, **more: Any) -> Any:
    """An option whose default depends on --quick."""
    words = [" ".join(map(str, value)) if isinstance(value, list) else value for value in (whole, quick)]
    text = f"{text}; default {said or '{} (--quick: {})'.format(*words)}"
    return option(None, text, whole=whole, quick=quick, **more)


@dataclass
class ReproduceOptions:
    """Which trainings to compare, on what, and which sweeps to run with the last of them."""

    llm_name_or_path: str = _settled("verifier: a hub name, a directory, or 'demo'", "gpt2", "demo", check=check_model)
    dataset_name: list[str] = option([], "training sets by name; default sharegpt and alpaca (--quick: demo)")
    dataset_path: list[str] = option([], "training sets from local files", check=check_file)
    eval_dataset_name: list[str] = option([], "evaluation sets by name; default the training sets and MT-Bench")
    eval_dataset_path: list[str] = option([], "evaluation sets from local files", check=check_file)
    methods: list[str] = option([*METHODS], f"what to learn from: {', '.join(METHODS)}")
    scopes: list[str] = option([*SCOPES], "learn from whole conversations (full), from replies only (assistant)")
    seeds: list[int] = _settled("one training each", [0, 1, 2], [0, 1])
    cell_seconds: float | None = _settled(
        "what a training should take: equally many steps for all", None, 90.0, "epochs (--quick: 90)"
    )
    max_examples: int = _settled("conversations per training set, the same for every method", 5000, 300, least=1)
    draft_vocab_size: str = _settled("D of every drafter", "all", "2048")
    train_flags: str = _settled(
        "flags of train_speculator.py for every training, in one string", "", QUICK_FLAGS, "none (--quick: some)"
    )
    launcher: str = option("", "starts the process that trains, such as 'accelerate launch --num_processes 8'")
    eval_max_examples: int = _settled("held-out prompts per evaluation set", 80, 48, least=1)
    eval_max_new_tokens: int = _settled("tokens of the verifier's reply at most", 128, 64, least=2)
    eval_widths: list[int] = option([3, 16], "beam widths at which every drafter is evaluated", least=1)
    widths: list[int] = _settled("beam widths of the sweeps", [1, 2, 3, 4, 6, 8, 16, 32, 64], [1, 2, 3, 4, 8], least=1)
    lengths: list[int] = option([1, 2, 3, 4, 5], "beam lengths of the sweeps, at most the 5 that are trained", least=1)
    batch_size: list[int] = _settled("batch sizes of the sweep, 1 always", [1, 2, 4, 8, 16], [1, 2, 4], least=1)
    sweep_prompts: int = _settled("prompts that the sweeps decode", 40, 12, least=1)
    sweeps: bool = option(True, "run the sweeps with the last drafter, and the trainings without recurrence")
    output_dir: str = option("./results/reproduction", "where trainings, results and report go")
    quick: bool = option(False, "a small grid, for two cores and 40 minutes")
    dry_run: bool = option(False, "print the plan and what it costs, run nothing")

    def __post_init__(self) -> None:
        for member in fields(self):
            if getattr(self, member.name) is None:
                setattr(self, member.name, member.metadata["quick" if self.quick else "whole"])
        if not self.dataset_name + self.dataset_path:
            self.dataset_name = ["demo"] if self.quick else ["sharegpt", "alpaca"]
        if not self.eval_dataset_name + self.eval_dataset_path:
            self.eval_dataset_name, self.eval_dataset_path = [*self.dataset_name], [*self.dataset_path]
            if self.quick:
                self.eval_dataset_path.append(str(sample_path("mt_bench.jsonl")))
            elif "mtbench" not in self.eval_dataset_name:
                self.eval_dataset_name.append("mtbench")
        self._check()

    def _check(self) -> None:
        self._check_lists()
        check_least(self)
        if self.cell_seconds is not None and self.cell_seconds <= 0:
            raise ValueError(f"--cell_seconds is {self.cell_seconds:g}, expected more than 0")
        for sets in (self.training_sets, self.evaluation_sets):
            labels = [source.label for source in sets]
            if len(set(labels)) < len(labels):
                raise ValueError(f"two data sets have one name ({', '.join(labels)}): give each once, or rename a file")

    def _check_lists(self) -> None:
        for name in ("methods", "scopes", "seeds", "eval_widths", "widths", "lengths", "batch_size"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} is {' '.join(map(str, values)) or 'empty'}, expected different values")
        choices: dict[str, Collection[str]] = {"methods": METHODS, "scopes": SCOPES}
        choices |= dict.fromkeys(("dataset_name", "eval_dataset_name"), DATASET_NAMES)
        for name, known in choices.items():
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"--{name} has {value} in it, expected {', '.join(known)}")
        if max(self.lengths) > DEPTHS:
            raise ValueError(f"--lengths has {max(self.lengths)} in it, expected at most {DEPTHS}")

    @property
    def training_sets(self) -> list["Source"]:
        return sources(self.dataset_name, self.dataset_path)

    @property
    def evaluation_sets(self) -> list["Source"]:
        return sources(self.eval_dataset_name, self.eval_dataset_path)


@dataclass(frozen=True)
class Source:
    """A data set by name, or in a local file."""

    name: str | None
    path: str | None

    @property
    def label(self) -> str:
        return self.name or Path(str(self.path)).name.split(".")[0]

    def flags(self) -> list[str]:
        """As ``train_speculator.py`` takes it."""
        return ["--dataset_name", self.name] if self.name else ["--dataset_path", str(self.path)]

    def held_out_split(self, training_sets: Sequence["Source"]) -> Split:
        """Its part to evaluate on: all of it where nothing of it is trained on."""
        return "eval" if self in training_sets or self.name in HAVE_EVALUATION_SET else "all"


def sources(names: Sequence[str], paths: Sequence[str]) -> list[Source]:
    return [*(Source(name, None) for name in names), *(Source(None, path) for path in paths)]


@dataclass(frozen=True)
class Recipe:
    """What is learned, from which part of which set, with or without recurrence: trainings up to their seed."""

    training_set: str
    scope: Scope
    method: Method
    rnn: bool

    @property
    def learns(self) -> str:
        return METHODS[self.method] + ("" if self.rnn else ", no recurrence")

    @property
    def part(self) -> str:
        return SCOPES[self.scope]

    def __str__(self) -> str:
        return f"{self.learns}; {self.part}; {self.training_set}"


@dataclass(frozen=True)
class Cell(Recipe):
    seed: int

    @property
    def name(self) -> str:
        """Its folder, and its name in results."""
        return f"{self.training_set}-{self.scope}-{self.method}{'' if self.rnn else '-no_rnn'}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The trainings in their order, whether their length is to be found first, and which drafter the sweeps take."""

    calibrated: bool
    cells: tuple[Cell, ...]
    showcase: Cell
    sweeps: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [*([CALIBRATION] if self.calibrated else []), *(cell.name for cell in self.cells), *self.sweeps]


def plan_of(options: ReproduceOptions) -> Plan:
    """All trainings, methods next to each other, so that what is compared is measured at about the same time.

    The last is of the paper's method where it is among those asked for: distilled targets, replies only, with
    recurrence. Trainings without recurrence stand beside it.
    """
    methods = [method for method in METHODS if method in options.methods]
    scopes = [scope for scope in SCOPES if scope in options.scopes]
    labels = [source.label for source in options.training_sets][::-1]  # the first one last
    cells = []
    for seed, label, scope in itertools.product(options.seeds, labels, scopes):
        best = (label, scope) == (labels[-1], scopes[-1])
        if best and options.sweeps:
            cells.append(Cell(label, scope, methods[-1], rnn=False, seed=seed))
        cells += [Cell(label, scope, method, rnn=True, seed=seed) for method in methods]
    return Plan(options.cell_seconds is not None, tuple(cells), cells[-1], SWEEPS if options.sweeps else ())


def training_flags(cell: Cell, options: ReproduceOptions, folder: Path, steps: int = 1) -> list[str]:
    """A cell's training, as flags of ``train_speculator.py``; --train_flags come last, and so override the others.

    ``steps`` is how long it trains where --cell_seconds is given. Weights are kept and evaluated as training leaves
    them: no checkpoint is chosen by what is reported afterwards.
    """
    (source,) = (source for source in options.training_sets if source.label == cell.training_set)
    flags = ["--llm_name_or_path", options.llm_name_or_path, *source.flags(), "--output_dir", str(folder)]
    flags += ["--drafter_predict_n_tokens", str(DEPTHS), "--draft_vocab_size", options.draft_vocab_size]
    flags += ["--seed", str(cell.seed), "--save_strategy", "no", "--drafter_top_k", "1"]
    if options.cell_seconds:
        flags += ["--max_steps", str(steps), "--eval_strategy", "steps", "--eval_steps", str(-(-steps // CURVE))]
    else:
        flags += ["--eval_strategy", "epoch"]
    if cell.scope == "assistant":
        flags.append("--train_on_assistant_only")
    if cell.method == "distilled":
        flags += ["--use_distilled_dataset", "--distill_num_future_tokens", str(DEPTHS)]
        flags += ["--distill_max_examples", str(2**31)]  # the conversations are limited, alike for all methods
    elif cell.method == "knowledge_distillation":
        flags.append("--use_knowledge_distillation")
    if not cell.rnn:
        flags.append("--no_rnn")
    return [*flags, *shlex.split(options.train_flags)]
