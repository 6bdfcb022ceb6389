"""Options, each written once and checked where it is made (layer 0)."""

from __future__ import annotations

from dataclasses import dataclass

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
        exit_dim: E, width of the draft head; ``None`` means H. At E = 2H there is no input projection.
        num_draft_layers: residual layers in front of the draft head.
        rnn: recurrent state (True), or a running sum of embeddings (False).
        emb_norm: RMS-normalise the embeddings that enter the recurrence.
        draft_vocab_size: D <= V, tokens that can be drafted; ``None`` means V.
        verifier_name_or_path: the verifier that it was trained for.
        tokenizer_hash: fingerprint of that verifier's vocabulary, checked when the two are joined.
    """

    model_type = "recurrent_drafter"

    hidden_size: int = 768
    vocab_size: int = 50257
    exit_dim: int | None = None
    num_draft_layers: int = 2
    rnn: bool = True
    emb_norm: bool = False
    draft_vocab_size: int | None = None
    initializer_range: float = 0.02
    verifier_name_or_path: str | None = None
    tokenizer_hash: str | None = None
    beam_width: int = 4
    beam_length: int = 5
    max_tree_nodes: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.exit_dim is None:
            self.exit_dim = self.hidden_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        _require(self.hidden_size > 0, f"hidden_size is {self.hidden_size}, expected at least 1")
        _require(self.vocab_size > 0, f"vocab_size is {self.vocab_size}, expected at least 1")
        _require(self.exit_dim > 0, f"exit_dim is {self.exit_dim}, expected at least 1")
        _require(self.num_draft_layers >= 0, f"num_draft_layers is {self.num_draft_layers}, expected at least 0")
        _require(
            1 <= self.draft_vocab_size <= self.vocab_size,
            f"draft_vocab_size is {self.draft_vocab_size}, expected 1 to {self.vocab_size} (the verifier's vocabulary)",
        )
        super().__post_init__(**kwargs)

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
