"""Options of a training, each written once: a flag on the command line, a keyword from Python.

Nothing here needs torch or transformers: what contradicts itself is refused before they load. What depends on
transformers' own options stands in `arguments`.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recurrent_drafter.data.parsing import check_file
from recurrent_drafter.data.sources import check_name
from recurrent_drafter.records.paths import check_checkpoint, check_drafter, check_model

Method = Literal["ground_truth", "distilled", "knowledge_distillation"]
BEST = "eval_tokens_per_step"  # what the best checkpoint is chosen by
QUICK_DEPTHS, QUICK_DRAFT_VOCABULARY = 5, "2048"


def option(default: Any, text: str, *, repr: bool = True, **more: Any) -> Any:
    """A field with its default (``...`` for none: it must be given) and its help.

    ``more`` may hold ``least``, which `check_least` holds it to; ``check``, a function that raises for what is wrong
    with the path it names; and what else the command line reads. Without ``repr`` it is kept out of the class's own.
    """
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=dataclasses.MISSING if default is ... else default, repr=repr, metadata=metadata)


def check_least(options: Any) -> None:
    """Raise ValueError for a number below the least that its option allows."""
    for member in dataclasses.fields(options):
        value, least = getattr(options, member.name), member.metadata.get("least")
        if least is not None and isinstance(value, list) and min(value) < least:
            raise ValueError(f"--{member.name} has {min(value)} in it, expected at least {least}")
        if least is not None and isinstance(value, int | float) and value < least:
            raise ValueError(f"--{member.name} is {value}, expected at least {least}")


def check_paths(*options: Any) -> None:
    """Raise ValueError or OSError for a path among options that leads nowhere."""
    for one in options:
        for member in dataclasses.fields(one):
            check, value = member.metadata.get("check"), getattr(one, member.name)
            for path in value if isinstance(value, list) else [value]:
                if check is not None and path is not None:
                    check(path)


def refuse_both(options: Any, *pairs: tuple[str, str]) -> None:
    """Raise ValueError for two options of which one says the contrary of the other."""
    for first, second in pairs:
        if getattr(options, first) and getattr(options, second):
            raise ValueError(f"--{first} and --{second} exclude each other: give one")


def read_template(given: str) -> str:
    """The chat template itself, or the content of the file that is named. Raises OSError."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OSError(f"--chat_template {given}: neither a Jinja template nor a file that can be read") from error


@dataclass
class ModelOptions:
    """Which verifier to draft for."""

    llm_name_or_path: str | None = option(
        None, "verifier: a hub name, a directory, or 'demo' (the bundled model); default gpt2", check=check_model
    )
    drafter_name_or_path: str | None = option(None, "with --phase eval: the drafter to evaluate", check=check_drafter)
    cache_dir: str | None = option(None, "where downloads are kept; default the hub's own place")


@dataclass
class DataOptions:
    """What to train and to evaluate on."""

    dataset_name: str | None = option(
        None, "sharegpt (default), alpaca, mtbench, wikitext, or 'demo' (bundled; default for demo)", check=check_name
    )
    dataset_path: str | None = option(None, "or a local file: .json[.gz] .jsonl[.gz] .txt .parquet", check=check_file)
    eval_dataset_name: str | None = option(None, "evaluate on this set; default the training's", check=check_name)
    eval_dataset_path: str | None = option(None, "evaluate on the held-out part of this file", check=check_file)
    eval_max_examples: int = option(16, "held-out prompts to evaluate on", least=1)
    eval_max_new_tokens: int = option(96, "tokens of the verifier's reply to each of them", least=2)
    model_max_length: int = option(512, "tokens of an example", least=2)
    train_on_assistant_only: bool = option(False, "roots in assistant replies only")
    chat_template: str | None = option(None, "Jinja, or a file of it; default the verifier's", check=read_template)
    streaming: bool = option(False, "read the data as training goes: for sets larger than memory, needs --max_steps")
    shuffle_buffer: int = option(1000, "with --streaming: examples that are shuffled together", least=1)


@dataclass
class DrafterOptions:
    """Architecture of the drafter, and what it learns to predict."""

    drafter_predict_n_tokens: int | None = option(None, "K, depths to train: 4, or as many as distilled", least=1)
    drafter_num_layers: int = option(2, "residual layers in front of the draft head", least=0)
    drafter_top_k: int = option(5, "report accuracies among the 1 to k most probable draft tokens", least=1)
    rnn: bool = option(True, "recurrent state (otherwise a running sum of embeddings)")
    exit_dim_multiplier: float = option(1.0, "E as a multiple of the verifier's width")
    emb_norm: bool = option(False, "normalize the embeddings that enter the recurrence")
    draft_vocab_size: str | None = option(None, "D, how many frequent tokens: a number, 'all' or 'auto' (default)")


@dataclass
class MethodOptions:
    """Which targets are made of the data; without any of these the text itself."""

    use_distilled_dataset: bool = option(False, "the paper's targets: the verifier's continuation of every position")
    distill_num_future_tokens: int = option(5, "tokens per continuation", least=1)
    distill_temperature: float = option(0.0, "0 continues greedily, as in the paper", least=0)
    distill_max_examples: int = option(1000, "conversations to distil at most", least=1)
    use_knowledge_distillation: bool = option(False, "learn the verifier's distribution along the text")
    kd_temperature: float = option(4.0, "softens both distributions")
    kd_alpha: float = option(0.7, "weight of the distribution; the rest is the text's")


@dataclass
class TrackerOptions:
    """Where figures are reported to."""

    report_to: list[str] = option(["none"], "wandb, tensorboard, ... (as many as wanted) or none")
    use_wandb: bool = option(False, "short for --report_to wandb")
    run_name: str | None = option(None, "what trackers call this run")

    @property
    def services(self) -> list[str]:
        """The trackers, each once."""
        asked = [*self.report_to, *(["wandb"] if self.use_wandb else [])]
        return [name for name in dict.fromkeys(asked) if name != "none"]


@dataclass
class RunningOptions:
    """What to do, for how long, and where it goes. Names and defaults are transformers' where it has them."""

    phase: Literal["train", "eval"] = option("train", "train a drafter, or evaluate one as training does")
    quick: bool = option(False, "train within four minutes on two cores; the verifier is 'demo' unless named")
    demo: bool = option(False, "only show what would run; trains nothing")
    estimate: bool = option(False, "whether a drafter can pay here, and what training costs; trains nothing")
    output_dir: str | None = option(None, "where the drafter goes; default a folder of the verifier's name in ./models")
    resume_from_checkpoint: str | None = option(
        None, "go on from this checkpoint, or True: from the newest one in --output_dir", check=check_checkpoint
    )
    num_train_epochs: float = option(3.0, "times through the data")
    max_steps: int = option(-1, "steps instead of epochs; -1: as many as the epochs have")
    per_device_train_batch_size: int = option(4, "examples per device and step", least=1)
    gradient_accumulation_steps: int = option(1, "batches of which one step is made")
    learning_rate: float = option(5e-4, "at the start")
    train_sampling_strategy: str = option("group_by_length", "or random, or sequential")
    bf16: bool = option(False, "compute in bfloat16, keep the weights in float32")
    seed: int = option(42, "of the weights at the start, and of the order of the data")
    eval_strategy: str | None = option(None, "no, steps or epoch; default as often as checkpoints are saved")
    load_best_model_at_end: bool | None = option(
        None, f"end with the checkpoint of the highest {BEST}; default yes, when each is evaluated"
    )
    early_stopping_patience: int | None = option(None, f"stop after N evaluations without a higher {BEST}", least=1)


NEEDS = {
    "drafter_name_or_path": "phase",
    "shuffle_buffer": "streaming",
    **dict.fromkeys(
        ("distill_num_future_tokens", "distill_temperature", "distill_max_examples"), "use_distilled_dataset"
    ),
    **dict.fromkeys(("kd_temperature", "kd_alpha"), "use_knowledge_distillation"),
}
EXCLUDE = (
    ("dataset_name", "dataset_path"),
    ("eval_dataset_name", "eval_dataset_path"),
    ("use_distilled_dataset", "use_knowledge_distillation"),
    ("quick", "use_knowledge_distillation"),
    ("streaming", "quick"),
)


@dataclass
class TrainingOptions(ModelOptions, DataOptions, DrafterOptions, MethodOptions, RunningOptions, TrackerOptions):
    """All options of ours; `TrainingArguments` are these and transformers' own."""

    def settle(self) -> None:
        """Give every option that depends on others its value; settled ones stay."""
        self.llm_name_or_path = self.llm_name_or_path or ("demo" if self.quick else "gpt2")
        if self.dataset_name is None and self.dataset_path is None:
            self.dataset_name = "demo" if self.quick or self.llm_name_or_path == "demo" else "sharegpt"
        if self.drafter_predict_n_tokens is None:
            distilled = self.distill_num_future_tokens if self.use_distilled_dataset else 4
            self.drafter_predict_n_tokens = QUICK_DEPTHS if self.quick else distilled
        self.draft_vocab_size = str(self.draft_vocab_size or (QUICK_DRAFT_VOCABULARY if self.quick else "auto"))
        if self.output_dir is None:
            name = Path(self.llm_name_or_path).name
            self.output_dir = f"./models/{name}-recurrent-drafter" + ("" if name == "demo" else "-trained")
        if self.use_wandb:
            self.report_to = self.services

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that cannot be and for options that contradict each other."""
        self._check_ranges()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        self.refuse_idle([name for name in NEEDS if getattr(self, name) != defaults[name]])
        refuse_both(self, *EXCLUDE)
        if self.streaming and self.use_distilled_dataset:
            raise ValueError("--streaming keeps no distilled targets: leave it out, their store is on disk already")
        if self.streaming and self.max_steps <= 0 and self.phase == "train":
            raise ValueError("--streaming needs --max_steps: how long a stream is, is not known")
        if self.phase == "eval" and self.drafter_name_or_path is None:
            raise ValueError("--phase eval needs the drafter to evaluate: give --drafter_name_or_path")
        depths = self.drafter_predict_n_tokens or 0
        if self.use_distilled_dataset and not self.quick and depths > self.distill_num_future_tokens:
            raise ValueError(
                f"--drafter_predict_n_tokens {depths} exceeds --distill_num_future_tokens "
                f"{self.distill_num_future_tokens}: distil at least as many tokens as are predicted"
            )

    def _check_ranges(self) -> None:
        check_least(self)
        for name in ("exit_dim_multiplier", "kd_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.kd_alpha <= 1:
            raise ValueError(f"--kd_alpha is {self.kd_alpha}, expected 0 to 1")
        size = str(self.draft_vocab_size or "auto")
        if size not in ("auto", "all") and not (size.isdecimal() and int(size) >= 1):
            raise ValueError(f"--draft_vocab_size is {size}, expected a number of at least 1, 'auto' or 'all'")

    def refuse_idle(self, given: Collection[str]) -> None:
        """Raise ValueError for an option that was given without the one it belongs to."""
        for name in given:
            needed = NEEDS.get(name)
            if needed == "phase" and self.phase != "eval":
                raise ValueError(f"--{name} is for --phase eval: leave it out, training begins with a new drafter")
            if needed not in (None, "phase") and not getattr(self, str(needed)):
                raise ValueError(f"--{name} does nothing without --{needed}: give both or neither")

    @property
    def method(self) -> Method:
        """How targets are made."""
        if self.use_knowledge_distillation:
            return "knowledge_distillation"
        return "distilled" if self.use_distilled_dataset or self.quick else "ground_truth"

    @property
    def depths(self) -> int:
        """K, settled."""
        assert self.drafter_predict_n_tokens is not None
        return self.drafter_predict_n_tokens

    def exit_dim(self, hidden_size: int) -> int:
        """E, for a verifier of this width."""
        return max(1, round(self.exit_dim_multiplier * hidden_size))
