"""Options, each written once and checked where it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_text(line: str) -> bool:
    """Whether a string from the command line or standard input is text; bytes that are not UTF-8 come as surrogates."""
    return line.encode(errors="ignore").decode() == line


@dataclass(frozen=True)
class SpeculatorOptions:
    """Which verifier and drafter decode, how much they draft, and where they compute."""

    base_model: str = field(
        default="demo", metadata={"help": "verifier: a hub name, a directory, or 'demo' (the bundled model)"}
    )
    speculator_path: str | None = field(
        default=None, metadata={"help": "a trained drafter; for 'demo' the bundled one is used without it"}
    )
    beam_width: int | None = field(
        default=None, metadata={"help": "W, beams; giving any of these three fixes the shape, which else follows cost"}
    )
    beam_length: int | None = field(default=None, metadata={"help": "L, tokens per beam, the root not counted"})
    max_tree_nodes: int | None = field(default=None, metadata={"help": "N, nodes verified per step, root included"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 where the hardware computes in it, otherwise float32"}
    )
    device: str | None = field(default=None, metadata={"help": "default: cuda where there is one, otherwise cpu"})

    def __post_init__(self) -> None:
        for name, least in (("beam_width", 1), ("beam_length", 1), ("max_tree_nodes", 2)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"--{name} is {value}, expected at least {least}")

    @property
    def drafting(self) -> list[str]:
        """The flags given that only matter with a drafter."""
        names = ("speculator_path", "beam_width", "beam_length", "max_tree_nodes")
        return [f"--{name}" for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class SamplingOptions:
    """How the verifier draws its tokens. What is not given is the model's own setting, as in transformers."""

    greedy_search: bool = field(
        default=False, metadata={"help": "always the most probable token; verify then leaves its sampled pass out"}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "more than 0 samples, 0 is greedy: default 0 (verify: 0.8 in its sampled pass)"}
    )
    top_p: float | None = field(default=None, metadata={"help": "sample from the likeliest tokens of this total mass"})
    top_k: int | None = field(default=None, metadata={"help": "sample from so many likeliest tokens; 0: from all"})
    min_p: float | None = field(
        default=None, metadata={"help": "sample from tokens at least this share as likely as the likeliest"}
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata={"help": "above 1 makes tokens that have occurred less likely; greedy search heeds it too"},
    )
    seed: int | None = field(default=None, metadata={"help": "of the draws; the same seed gives the same tokens"})

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
            _require(value is None or holds(value), f"--{name} is {value}, expected {expected}")
        _require(
            not (self.greedy_search and self.temperature),
            f"--greedy_search and --temperature {self.temperature} contradict each other: leave one out",
        )

    def arguments(self, temperature: float = 0.0) -> dict[str, float | int | bool]:
        """Arguments of ``generate``, at ``temperature`` if none was given; the seed is not among them."""
        given: dict[str, float | int | bool] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        if given.setdefault("temperature", temperature) > 0 and not self.greedy_search:
            return {"do_sample": True, **given}
        warpers = [f"--{name}" for name in ("top_p", "top_k", "min_p") if name in given]
        _require(
            not warpers,
            f"{' and '.join(warpers)} only matters when sampling: give a --temperature above 0, or leave it out",
        )
        kept = {name: given[name] for name in ("repetition_penalty",) if name in given}
        return {"do_sample": False, **kept}


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate."""

    prompt: str | None = field(default=None, metadata={"help": "reply to this and stop"})
    interactive: bool = field(default=False, metadata={"help": "chat"})
    eval_mt_bench: bool = field(
        default=False, metadata={"help": "answer the questions of MT-Bench, both turns of each, and measure"}
    )
    autoregressive: bool = field(default=False, metadata={"help": "no drafter: the verifier alone"})
    compare: bool = field(
        default=False, metadata={"help": "with --eval_mt_bench or --prompt: with the drafter and without, side by side"}
    )
    max_generation_length: int = field(default=200, metadata={"help": "new tokens at most"})
    show_drafts: bool = field(default=False, metadata={"help": "colour the tokens that were drafted and accepted"})
    profile: bool = field(default=False, metadata={"help": "show at the end where a step's time went"})

    def __post_init__(self) -> None:
        _require(
            self.max_generation_length >= 1,
            f"--max_generation_length is {self.max_generation_length}, expected at least 1",
        )
        _require(self.prompt is None or bool(self.prompt.strip()), "--prompt is empty: expected some text")
        _require(
            self.prompt is None or is_text(self.prompt),
            "--prompt holds bytes that are no text: expected UTF-8",
        )
        _require(
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
            _require(not excluded, f"--{name} cannot be had with --{other}: leave one out")

    @property
    def is_evaluation(self) -> bool:
        """Whether replies are measured and counted, not shown."""
        return self.eval_mt_bench or self.compare


@dataclass(frozen=True)
class EvaluationOptions:
    """What ``--eval_mt_bench`` and ``--compare`` ask, and where their results go."""

    dataset_path: str | None = field(
        default=None, metadata={"help": "other questions, in FastChat's format (default: MT-Bench's 80, bundled)"}
    )
    max_num_prompts: int | None = field(
        default=None, metadata={"help": "questions at most, evenly over the categories (default: all)"}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "tokens of a prompt at most (default: what the context leaves)"}
    )
    batch_size: int = field(default=1, metadata={"help": "questions answered together"})
    output_file: str | None = field(default=None, metadata={"help": "every reply and all figures, as JSON"})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "wandb, tensorboard, ... (as many as wanted) or none"}
    )
    run_name: str | None = field(default=None, metadata={"help": "what trackers call this run"})
    use_wandb: bool = field(default=False, metadata={"help": "short for --report_to wandb"})
    wandb_project: str | None = field(
        default=None, metadata={"help": "default: WANDB_PROJECT, otherwise 'recurrent-drafter'"}
    )

    def __post_init__(self) -> None:
        for name in ("max_num_prompts", "max_prompt_length", "batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name} is {value}, expected at least 1")
        _require(self.run_name is None or bool(self.services), "--run_name is for trackers: give --report_to too")
        _require(
            self.wandb_project is None or "wandb" in self.services, "--wandb_project is for W&B: give --use_wandb too"
        )

    @property
    def services(self) -> list[str]:
        """The trackers, each once."""
        asked = [*self.report_to, *(["wandb"] if self.use_wandb else [])]
        return [name for name in dict.fromkeys(asked) if name != "none"]

    @property
    def given(self) -> list[str]:
        """Flags that are not at their defaults."""
        plain = type(self)()
        return [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts to decode, and how far."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "evaluation split of demo (default), sharegpt, alpaca, mtbench or wikitext"}
    )
    dataset_path: str | None = field(
        default=None, metadata={"help": "a local file instead, all of it: .json .jsonl .jsonl.gz .txt .parquet"}
    )
    prompts: int | None = field(default=None, metadata={"help": "how many: default 50 (tune: 20)"})
    new_tokens: int = field(default=128, metadata={"help": "tokens per reply; at most, with --no_sustained"})
    sustained: bool = field(default=True, metadata={"help": "go on behind end tokens; otherwise replies stop there"})

    def __post_init__(self) -> None:
        _require(
            self.dataset_name is None or self.dataset_path is None,
            "--dataset_name and --dataset_path exclude each other: give one",
        )
        _require(self.prompts is None or self.prompts >= 1, f"--prompts is {self.prompts}, expected at least 1")
        _require(self.new_tokens >= 2, f"--new_tokens is {self.new_tokens}, expected at least 2")


@dataclass(frozen=True)
class VerifyOptions:
    """How to verify that speculation changes no token."""

    batch_size: int = field(default=1, metadata={"help": "prompts decoded together, of different lengths"})
    auto: bool = field(default=False, metadata={"help": "also with the tree that follows cost and acceptance"})
    output_file: str | None = field(default=None, metadata={"help": "every comparison, as JSON"})

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"--batch_size is {self.batch_size}, expected at least 1")


@dataclass(frozen=True)
class TuneOptions:
    """Which shapes of draft to try, and where to save what was found."""

    batch_size: list[int] = field(default_factory=lambda: [1], metadata={"help": "batch sizes; the first decides"})
    widths: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8], metadata={"help": "beam widths to try"})
    lengths: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 8], metadata={"help": "beam lengths to try"})
    confirm: int = field(default=3, metadata={"help": "how many of the best shapes to decode with"})
    output_dir: str | None = field(
        default=None, metadata={"help": "where tuning.json and tuning.png go: default the drafter's own folder"}
    )
    copy_drafter: bool = field(
        default=False, metadata={"help": "copy the drafter into --output_dir, which then is a tuned drafter"}
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "widths", "lengths"):
            values = getattr(self, name)
            _require(min(values) >= 1, f"--{name} has {min(values)} in it, expected at least 1")
            _require(len(set(values)) == len(values), f"--{name} names a number twice")
        _require(self.confirm >= 1, f"--confirm is {self.confirm}, expected at least 1")
        _require(not self.copy_drafter or self.output_dir is not None, "--copy_drafter needs --output_dir")
