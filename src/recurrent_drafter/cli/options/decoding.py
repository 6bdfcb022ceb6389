"""Options of what decodes: which verifier and drafter, how tokens are drawn, what is asked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.data.parsing import check_file
from recurrent_drafter.data.sources import check_name
from recurrent_drafter.records.paths import check_drafter, check_model, check_writable
from recurrent_drafter.training.options import TrackerOptions, check_paths, option, refuse_both


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def given(options: Any, *names: str) -> dict[str, Any]:
    """Those of some options that are not None."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def flags(names: Iterable[str]) -> str:
    return " and ".join(f"--{name}" for name in names)


def is_text(line: str) -> bool:
    """Whether a string from the command line or standard input is text; bytes that are not UTF-8 come as surrogates."""
    return line.encode(errors="ignore").decode() == line


@dataclass(frozen=True)
class VerifierOptions:
    base_model: str = option("demo", "verifier: hub name, directory, or 'demo' (bundled; default)", check=check_model)


@dataclass(frozen=True)
class DeviceOptions(VerifierOptions):
    """Which model, and where it computes in which numbers."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 where the hardware computes in it, otherwise float32"
    )
    device: str | None = option(None, "default: cuda where there is one, otherwise cpu")


@dataclass(frozen=True)
class LookupOptions:
    lookup: bool | None = option(
        None, "also draft what prompt and replies have said before (default: unless the shape is fixed)"
    )


@dataclass(frozen=True)
class PairOptions(DeviceOptions, LookupOptions):
    speculator_path: str | None = option(
        None, "a trained drafter; --base_model demo has a bundled one", check=check_drafter
    )

    @property
    def drafter(self) -> str | None:
        """Where the drafter is: as named, or for ``demo`` the bundled one. None for lookup alone."""
        is_bundled = self.speculator_path is None and self.base_model == "demo"
        return str(demo_drafter_path()) if is_bundled else self.speculator_path

    def check_speculation(self, *shape: str) -> None:
        """Raise ValueError where nothing is left to draft with, or a ``shape`` is given without a drafter."""
        if self.drafter is None and shape:
            raise ValueError(f"{flags(shape)} only matters with a drafter: {no_drafter(self.base_model)}")
        if self.drafter is None and self.lookup is False:
            raise ValueError(f"--no_lookup leaves nothing to draft with: {no_drafter(self.base_model)}")


def drafter_path(base_model: str, speculator_path: str | None) -> str:
    """The same where there must be one. Raises ValueError where none is named."""
    path = PairOptions(base_model=base_model, speculator_path=speculator_path).drafter
    if path is None:
        raise ValueError(no_drafter(base_model))
    return path


def no_drafter(base_model: str) -> str:
    """What to do where one is needed."""
    return (
        f"no drafter is named for {base_model}: give --speculator_path, or train one with "
        f"train_speculator.py --llm_name_or_path {base_model}"
    )


def lookup_alone(base_model: str) -> str:
    """What there is without a drafter, and what one would add."""
    return (
        f"lookup alone: text that repeats is drafted. A drafter for {base_model} adds drafts of new text: "
        f"train one with train_speculator.py --llm_name_or_path {base_model}"
    )


@dataclass(frozen=True)
class SourceOptions:
    dataset_name: str | None = option(
        None, "evaluation split of demo (default), sharegpt, alpaca, mtbench or wikitext", check=check_name
    )
    dataset_path: str | None = option(None, "or a local file: .json[.gz] .jsonl[.gz] .txt .parquet", check=check_file)

    def __post_init__(self) -> None:
        refuse_both(self, ("dataset_name", "dataset_path"))


@dataclass(frozen=True)
class SpeculatorOptions(PairOptions):
    beam_width: int | None = option(None, "W, beams; any of these three fixes the shape, else cost decides", least=1)
    beam_length: int | None = option(None, "L, tokens per beam, the root not counted", least=1)
    max_tree_nodes: int | None = option(None, "N, nodes verified per step, root included", least=2)

    @property
    def shape(self) -> dict[str, int]:
        """What is given of the draft's shape."""
        return given(self, "beam_width", "beam_length", "max_tree_nodes")


@dataclass(frozen=True)
class SamplingOptions:
    """How the verifier draws its tokens. What is not given is the model's own setting, as in transformers."""

    greedy_search: bool = option(False, "always the most probable token; verify then leaves its sampled pass out")
    temperature: float | None = option(None, "more than 0 samples, 0 is greedy: default 0 (verify samples at 0.8)")
    top_p: float | None = option(None, "sample from the likeliest tokens of this total mass")
    top_k: int | None = option(None, "sample from so many likeliest tokens; 0: from all")
    min_p: float | None = option(None, "sample from tokens at least this share as likely as the likeliest")
    repetition_penalty: float | None = option(None, "above 1 makes earlier tokens less likely, in greedy search too")
    seed: int | None = option(None, "of the draws; the same seed gives the same tokens")

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("temperature", lambda x: x == 0 or 1e-3 <= x < float("inf"), "0 (greedy), or 0.001 or more"),
            ("top_p", lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            ("top_k", lambda x: x >= 0, "at least 0"),
            ("min_p", lambda x: 0 <= x <= 1, "0 to 1"),
            ("repetition_penalty", lambda x: 0 < x < float("inf"), "more than 0"),
            ("seed", lambda x: 0 <= x < 2**63, "0 to 2^63 - 1"),
        )
        for name, holds, expected in ranges:
            value = getattr(self, name)
            require(value is None or holds(value), f"--{name} is {value}, expected {expected}")
        require(
            not (self.greedy_search and self.temperature),
            f"--greedy_search and --temperature {self.temperature} contradict each other: leave one out",
        )

    def arguments(self, temperature: float = 0.0) -> dict[str, Any]:
        """Arguments of ``generate``, at ``temperature`` if none was given; the seed is not among them."""
        penalty, warpers = given(self, "repetition_penalty"), given(self, "top_p", "top_k", "min_p")
        chosen = temperature if self.temperature is None else self.temperature
        if chosen > 0 and not self.greedy_search:
            return {"do_sample": True, "temperature": chosen, **warpers, **penalty}
        require(
            not warpers, f"{flags(warpers)} only matters when sampling: give a --temperature above 0, or leave it out"
        )
        return {"do_sample": False, **penalty}


@dataclass(frozen=True)
class GenerateOptions:
    prompt: str | None = option(None, "reply to this and stop")
    interactive: bool = option(False, "chat")
    eval_mt_bench: bool = option(False, "answer the questions of MT-Bench, both turns of each, and measure")
    autoregressive: bool = option(False, "neither drafter nor lookup: the verifier alone")
    compare: bool = option(False, "with --eval_mt_bench or --prompt: with drafts and without, side by side")
    max_generation_length: int = option(200, "new tokens at most", least=1)
    show_drafts: bool = option(False, "color the tokens that were drafted and accepted, by drafter or lookup")
    profile: bool = option(False, "show at the end where a step's time went")

    def __post_init__(self) -> None:
        require(self.prompt is None or bool(self.prompt.strip()), "--prompt is empty: expected some text")
        require(self.prompt is None or is_text(self.prompt), "--prompt holds bytes that are no text: expected UTF-8")
        require(
            [self.prompt is not None, self.interactive, self.eval_mt_bench].count(True) == 1,
            "give one of --prompt TEXT, --interactive and --eval_mt_bench",
        )
        for name, other, excluded in (
            ("compare", "interactive", self.compare and self.interactive),
            ("compare", "autoregressive", self.compare and self.autoregressive),
            ("compare", "profile", self.compare and self.profile),
            ("show_drafts", "autoregressive", self.show_drafts and self.autoregressive),
            ("show_drafts", "compare or --eval_mt_bench", self.show_drafts and self.is_evaluation),
        ):
            require(not excluded, f"--{name} cannot be had with --{other}: leave one out")

    @property
    def is_evaluation(self) -> bool:
        """Whether replies are measured and counted, not shown."""
        return self.eval_mt_bench or self.compare


@dataclass
class EvaluationOptions(TrackerOptions):
    """What ``--eval_mt_bench`` and ``--compare`` ask, and where their results go."""

    dataset_path: str | None = option(
        None, "questions in FastChat's format (default: MT-Bench, bundled)", check=check_file
    )
    max_num_prompts: int | None = option(None, "questions at most, evenly over the categories (default: all)", least=1)
    max_prompt_length: int | None = option(None, "prompt tokens at most (default: what the context leaves)", least=1)
    batch_size: int = option(1, "questions answered together", least=1)
    output_file: str | None = option(None, "every reply and all figures, as JSON", check=check_writable)
    wandb_project: str | None = option(None, "default: WANDB_PROJECT, otherwise 'recurrent-drafter'")

    def __post_init__(self) -> None:
        require(self.run_name is None or bool(self.services), "--run_name is for trackers: add --report_to")
        require(self.wandb_project is None or "wandb" in self.services, "--wandb_project is for W&B: add --use_wandb")


def check_generate(
    which: SpeculatorOptions, sampling: SamplingOptions, options: GenerateOptions, asked: EvaluationOptions
) -> None:
    sampling.arguments()
    drafting = [*given(which, "speculator_path", *which.shape), *(["lookup"] if which.lookup else [])]
    if options.autoregressive and drafting:
        raise ValueError(f"--autoregressive drafts nothing: drop {flags(drafting)}")
    plain = EvaluationOptions()
    changed = [f.name for f in fields(asked) if getattr(asked, f.name) != getattr(plain, f.name)]
    if changed and not options.is_evaluation:
        raise ValueError(f"{flags(changed)} only matters with --eval_mt_bench or --compare")
    if options.prompt is not None and (asked.dataset_path is not None or asked.max_num_prompts is not None):
        raise ValueError("--dataset_path and --max_num_prompts choose among questions: drop them, or --prompt")
    check_paths(which, asked)
    if not options.autoregressive:
        which.check_speculation(*which.shape)
