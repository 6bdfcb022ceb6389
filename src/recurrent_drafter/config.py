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
