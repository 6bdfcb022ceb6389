"""Options, each written once and checked where it is made (layer 0)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@strict
class RecurrentDraftingConfig(PreTrainedConfig):
    """Architecture of a recurrent drafter, and the verifier that it belongs to.

    Args:
        hidden_size: H, width of the verifier's last hidden state and of its input embedding.
        vocab_size: V, the verifier's vocabulary.
        exit_dim: E, width of the draft head; 0 means H. At E = 2H there is no input projection.
        num_draft_layers: residual layers in front of the draft head.
        rnn: recurrent state (True), or a running sum of embeddings (False).
        emb_norm: RMS-normalise the embeddings that enter the recurrence.
        draft_vocab_size: D <= V, tokens that can be drafted; 0 means V.
        verifier_name_or_path: the verifier that it was trained for.
        tokenizer_hash: fingerprint of that verifier's vocabulary, checked when the two are joined.
    """

    model_type = "recurrent_drafter"

    hidden_size: int = 768
    vocab_size: int = 50257
    exit_dim: int = 0
    num_draft_layers: int = 2
    rnn: bool = True
    emb_norm: bool = False
    draft_vocab_size: int = 0
    initializer_range: float = 0.02
    verifier_name_or_path: str | None = None
    tokenizer_hash: str | None = None
    beam_width: int = 4
    beam_length: int = 5
    max_tree_nodes: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        self.exit_dim = self.exit_dim or self.hidden_size
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        _require(self.hidden_size > 0, f"hidden_size is {self.hidden_size}, expected at least 1")
        _require(self.vocab_size > 0, f"vocab_size is {self.vocab_size}, expected at least 1")
        _require(self.exit_dim > 0, f"exit_dim is {self.exit_dim}, expected at least 1")
        _require(self.num_draft_layers >= 0, f"num_draft_layers is {self.num_draft_layers}, expected at least 0")
        _require(
            1 <= self.draft_vocab_size <= self.vocab_size,
            f"draft_vocab_size is {self.draft_vocab_size}, expected 1 to {self.vocab_size} (the verifier's vocabulary)",
        )
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def draft_shape(self) -> DraftShape:
        """The shape of draft that suits this drafter, as measured when it was made."""
        return DraftShape(self.beam_width, self.beam_length, self.max_tree_nodes)


@dataclass(frozen=True)
class DraftShape:
    """How far and how wide to draft: W beams of L tokens (the root not counted), verified as at most N tree nodes."""

    beam_width: int = 4
    beam_length: int = 5
    max_tree_nodes: int | None = None

    def __post_init__(self) -> None:
        _require(self.beam_width >= 1, f"beam_width is {self.beam_width}, expected at least 1")
        _require(self.beam_length >= 1, f"beam_length is {self.beam_length}, expected at least 1")
        _require(
            self.max_tree_nodes is None or self.max_tree_nodes >= 2,
            f"max_tree_nodes is {self.max_tree_nodes}, expected at least 2 (the root and one draft token)",
        )

    @property
    def nodes(self) -> int:
        """N: the nodes that are verified in one step, the root included."""
        full = 1 + self.beam_width * self.beam_length
        return full if self.max_tree_nodes is None else min(full, self.max_tree_nodes)


@dataclass(frozen=True)
class ModelOptions:
    """Which verifier, and which architecture of drafter."""

    llm_name_or_path: str = field(
        default="gpt2", metadata={"help": "verifier: a hub name, a directory, or 'demo' (the bundled model)"}
    )
    drafter_predict_n_tokens: int | None = field(
        default=None, metadata={"help": "K, depths to train: default 4, with distillation as many as are distilled"}
    )
    drafter_num_layers: int = field(default=2, metadata={"help": "residual layers in front of the draft head"})
    rnn: bool = field(default=True, metadata={"help": "recurrent state (otherwise a running sum of embeddings)"})
    exit_dim_multiplier: float = field(default=1.0, metadata={"help": "E as a multiple of the verifier's width"})
    emb_norm: bool = field(default=False, metadata={"help": "normalise the embeddings that enter the recurrence"})
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "D, how many of the most frequent target tokens can be drafted: default all"}
    )
    quick: bool = field(
        default=False, metadata={"help": "train within four minutes on two cores; the verifier is 'demo' unless named"}
    )
    demo: bool = field(default=False, metadata={"help": "only show what would run; trains nothing"})

    def __post_init__(self) -> None:
        tokens = self.drafter_predict_n_tokens
        _require(tokens is None or tokens >= 1, f"--drafter_predict_n_tokens is {tokens}, expected at least 1")
        _require(
            self.drafter_num_layers >= 0, f"--drafter_num_layers is {self.drafter_num_layers}, expected at least 0"
        )
        _require(
            self.exit_dim_multiplier > 0, f"--exit_dim_multiplier is {self.exit_dim_multiplier}, expected more than 0"
        )


@dataclass(frozen=True)
class DataOptions:
    """What to train on, and which targets are made of it."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "sharegpt (default), alpaca, mtbench, wikitext, or 'demo' (the bundled conversations)"},
    )
    dataset_path: str | None = field(
        default=None, metadata={"help": "a local file instead: .json, .jsonl, either with .gz, .txt or .parquet"}
    )
    model_max_length: int = field(default=512, metadata={"help": "tokens of an example"})
    train_on_assistant_only: bool = field(default=False, metadata={"help": "roots in assistant replies only"})
    use_distilled_dataset: bool = field(
        default=False, metadata={"help": "the paper's targets: the verifier's own continuation of every position"}
    )
    distill_num_future_tokens: int = field(default=5, metadata={"help": "tokens per continuation"})
    distill_temperature: float = field(default=0.0, metadata={"help": "only 0 (greedy) so far"})
    distill_max_examples: int = field(default=1000, metadata={"help": "conversations to distil at most"})

    def __post_init__(self) -> None:
        _require(
            self.dataset_name is None or self.dataset_path is None,
            "--dataset_name and --dataset_path exclude each other: give one",
        )
        _require(self.model_max_length >= 2, f"--model_max_length is {self.model_max_length}, expected at least 2")
        _require(
            self.distill_num_future_tokens >= 1,
            f"--distill_num_future_tokens is {self.distill_num_future_tokens}, expected at least 1",
        )
        _require(
            self.distill_max_examples >= 1,
            f"--distill_max_examples is {self.distill_max_examples}, expected at least 1",
        )
        _require(
            self.distill_temperature == 0.0,
            f"--distill_temperature is {self.distill_temperature}: only 0, the paper's setting, is supported so far",
        )


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate."""

    base_model: str = field(
        default="demo", metadata={"help": "verifier: a hub name, a directory, or 'demo' (the bundled model)"}
    )
    speculator_path: str | None = field(
        default=None, metadata={"help": "a trained drafter; for 'demo' the bundled one is used without it"}
    )
    prompt: str | None = field(default=None, metadata={"help": "reply to this and stop"})
    interactive: bool = field(default=False, metadata={"help": "chat"})
    autoregressive: bool = field(default=False, metadata={"help": "no drafter: the verifier alone"})
    max_generation_length: int = field(default=200, metadata={"help": "new tokens at most"})
    beam_width: int | None = field(default=None, metadata={"help": "W, beams: default as saved with the drafter"})
    beam_length: int | None = field(default=None, metadata={"help": "L, tokens per beam, the root not counted"})
    max_tree_nodes: int | None = field(default=None, metadata={"help": "N, nodes verified per step, root included"})
    profile: bool = field(default=False, metadata={"help": "show at the end where a step's time went"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 where the hardware computes in it, otherwise float32"}
    )
    device: str | None = field(default=None, metadata={"help": "default: cuda where there is one, otherwise cpu"})

    def __post_init__(self) -> None:
        _require(
            self.max_generation_length >= 1,
            f"--max_generation_length is {self.max_generation_length}, expected at least 1",
        )
        for name, least in (("beam_width", 1), ("beam_length", 1), ("max_tree_nodes", 2)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"--{name} is {value}, expected at least {least}")
        _require(self.prompt is None or bool(self.prompt.strip()), "--prompt is empty: expected some text")
        _require((self.prompt is None) == self.interactive, "give either --prompt TEXT or --interactive")
        _require(
            not (self.autoregressive and self.speculator_path),
            "--autoregressive uses no drafter: drop --speculator_path",
        )
