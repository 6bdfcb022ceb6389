"""Options of a training, each written once: a flag on the command line, a keyword from Python.

Nothing here needs torch or transformers: what contradicts itself is refused before they load. What depends on
transformers' own options stands in `arguments`.
"""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["ground_truth", "distilled", "knowledge_distillation"]
BEST = "eval_tokens_per_step"  # what the best checkpoint is chosen by
QUICK_DEPTHS, QUICK_DRAFT_VOCABULARY = 5, "2048"


def option(default: Any, text: str) -> Any:
    """A field with its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class RunOptions:
    """What to do, and with which verifier."""

    llm_name_or_path: str | None = option(
        None, "verifier: a hub name, a directory, or 'demo' (the bundled model); default gpt2"
    )
    drafter_name_or_path: str | None = option(None, "with --phase eval: the drafter to evaluate")
    cache_dir: str | None = option(None, "where downloads are kept; default the hub's own place")
    phase: Literal["train", "eval"] = option("train", "train a drafter, or evaluate one as training does")
    quick: bool = option(False, "train within four minutes on two cores; the verifier is 'demo' unless named")
    demo: bool = option(False, "only show what would run; trains nothing")
    estimate: bool = option(False, "whether a drafter can pay here, and what training costs; trains nothing")
    early_stopping_patience: int | None = option(None, f"stop after so many evaluations without a higher {BEST}")
    use_wandb: bool = option(False, "short for --report_to wandb")


@dataclass
class DataOptions:
    """What to train and to evaluate on."""

    dataset_name: str | None = option(
        None, "sharegpt (default), alpaca, mtbench, wikitext, or 'demo' (the bundled conversations, default for demo)"
    )
    dataset_path: str | None = option(None, "a local file instead: .json, .jsonl, either with .gz, .txt or .parquet")
    eval_dataset_name: str | None = option(None, "evaluate on the held-out part of this set; default the training's")
    eval_dataset_path: str | None = option(None, "evaluate on the held-out part of this file")
    eval_max_examples: int = option(16, "held-out prompts to evaluate on")
    eval_max_new_tokens: int = option(96, "tokens of the verifier's reply to each of them")
    model_max_length: int = option(512, "tokens of an example")
    train_on_assistant_only: bool = option(False, "roots in assistant replies only")
    chat_template: str | None = option(None, "a Jinja chat template, or a file of one; default the verifier's own")
    streaming: bool = option(False, "read the data as training goes: for sets larger than memory, needs --max_steps")
    shuffle_buffer: int = option(1000, "with --streaming: examples that are shuffled together")


@dataclass
class DrafterOptions:
    """Architecture of the drafter, and what it learns to predict."""

    drafter_predict_n_tokens: int | None = option(
        None, "K, depths to train: default 4, with distillation as many as are distilled"
    )
    drafter_num_layers: int = option(2, "residual layers in front of the draft head")
    drafter_top_k: int = option(5, "report accuracies among the 1 to k most probable draft tokens")
    rnn: bool = option(True, "recurrent state (otherwise a running sum of embeddings)")
    exit_dim_multiplier: float = option(1.0, "E as a multiple of the verifier's width")
    emb_norm: bool = option(False, "normalise the embeddings that enter the recurrence")
    draft_vocab_size: str | None = option(
        None, "D, how many of the most frequent target tokens can be drafted: a number, 'all', or 'auto' (default)"
    )


@dataclass
class MethodOptions:
    """Which targets are made of the data; without any of these the text itself."""

    use_distilled_dataset: bool = option(
        False, "the paper's targets: the verifier's own continuation of every position"
    )
    distill_num_future_tokens: int = option(5, "tokens per continuation")
    distill_temperature: float = option(0.0, "0 continues greedily, as in the paper")
    distill_max_examples: int = option(1000, "conversations to distil at most")
    use_knowledge_distillation: bool = option(False, "learn the verifier's distribution along the text")
    kd_temperature: float = option(4.0, "softens both distributions")
    kd_alpha: float = option(0.7, "weight of the distribution; the rest is the text's")


NEEDS = {
    "drafter_name_or_path": "phase",
    "shuffle_buffer": "streaming",
    **dict.fromkeys(
        ("distill_num_future_tokens", "distill_temperature", "distill_max_examples"), "use_distilled_dataset"
    ),
    **dict.fromkeys(("kd_temperature", "kd_alpha"), "use_knowledge_distillation"),
}
LEAST = {
    "drafter_predict_n_tokens": 1,
    "drafter_num_layers": 0,
    "drafter_top_k": 1,
    "model_max_length": 2,
    "eval_max_examples": 1,
    "eval_max_new_tokens": 2,
    "shuffle_buffer": 1,
    "distill_num_future_tokens": 1,
    "distill_temperature": 0,
    "distill_max_examples": 1,
    "early_stopping_patience": 1,
}
EXCLUDE = (
    ("dataset_name", "dataset_path"),
    ("eval_dataset_name", "eval_dataset_path"),
    ("use_distilled_dataset", "use_knowledge_distillation"),
    ("quick", "use_knowledge_distillation"),
    ("streaming", "quick"),
)


@dataclass
class TrainingOptions(RunOptions, DataOptions, DrafterOptions, MethodOptions):
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

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that cannot be and for options that contradict each other."""
        self._check_ranges()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        self.refuse_idle([name for name in NEEDS if getattr(self, name) != defaults[name]])
        for first, second in EXCLUDE:
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"--{first} and --{second} exclude each other: give one")
        if self.streaming and self.use_distilled_dataset:
            raise ValueError("--streaming keeps no distilled targets: leave it out, their store is on disk already")
        if self.phase == "eval" and self.drafter_name_or_path is None:
            raise ValueError("--phase eval needs the drafter to evaluate: give --drafter_name_or_path")
        depths = self.drafter_predict_n_tokens or 0
        if self.use_distilled_dataset and not self.quick and depths > self.distill_num_future_tokens:
            raise ValueError(
                f"--drafter_predict_n_tokens {depths} exceeds --distill_num_future_tokens "
                f"{self.distill_num_future_tokens}: distil at least as many tokens as are predicted"
            )

    def _check_ranges(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}, expected at least {least}")
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
    def default_output_dir(self) -> str:
        """Where the drafter goes unless told otherwise."""
        name = Path(str(self.llm_name_or_path)).name
        return f"./models/{name}-recurrent-drafter" + ("" if name == "demo" else "-trained")

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
