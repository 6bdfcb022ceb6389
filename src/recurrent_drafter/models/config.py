"""A drafter's architecture, and the shape of its drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

SPECULATORS_VERSION = "0.9.0"  # of the package whose format is written and read


def _require_at_least(least: int, owner: object, *names: str) -> None:
    for name in names:
        if (value := getattr(owner, name)) < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")


@strict
class RecurrentDraftingConfig(PreTrainedConfig):
    """Architecture of a recurrent drafter, and the verifier that it belongs to.

    Written to config.json, it also says what vLLM and the ``speculators`` package look for. That is made from these
    fields whenever a config is written, and not read back: the fields are the one truth.

    Attributes:
        hidden_size: H, width of the verifier's last hidden state and of its input embedding.
        vocab_size: V, the verifier's vocabulary.
        exit_dim: E, width of the draft head; 0 means H. At E = 2H there is no input projection.
        num_draft_layers: residual layers in front of the draft head.
        rnn: recurrent state (True), or a running sum of embeddings (False).
        emb_norm: RMS-normalize the embeddings that enter the recurrence.
        draft_vocab_size: D <= V, tokens that can be drafted; 0 means V.
        verifier_name_or_path: the verifier that it was trained for; without it nothing is said to the other engines.
        verifier_architectures: the classes that the verifier's own config.json names.
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
    verifier_architectures: list[str] | None = None
    tokenizer_hash: str | None = None
    beam_width: int = 4
    beam_length: int = 5
    max_tree_nodes: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        self.exit_dim = self.exit_dim or self.hidden_size
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        _require_at_least(1, self, "hidden_size", "vocab_size", "exit_dim")
        _require_at_least(0, self, "num_draft_layers")
        if not 1 <= (size := self.draft_vocab_size) <= self.vocab_size:
            raise ValueError(f"draft_vocab_size is {size}, expected 1 to {self.vocab_size} (the verifier's vocabulary)")
        for name in [*kwargs]:
            if name.startswith("speculators_") or name == "transformer_layer_config":
                del kwargs[name]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the fields, and for a drafter that names its verifier the speculators format."""
        written: dict[str, Any] = super().to_dict()
        if not self.verifier_name_or_path:
            return written
        chain = {  # of which a token is accepted where it is the verifier's own, and no other
            "proposal_type": "greedy",
            "speculative_tokens": self.beam_length,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return written | {
            "speculators_model_type": self.model_type,
            "speculators_version": SPECULATORS_VERSION,
            "speculators_config": {
                "algorithm": self.model_type,
                "default_proposal_method": chain["proposal_type"],
                "proposal_methods": [chain],
                "verifier": {
                    "name_or_path": self.verifier_name_or_path,
                    "architectures": self.verifier_architectures or [],
                },
            },
            "transformer_layer_config": {
                "model_type": self.model_type,
                "hidden_size": self.hidden_size,
                "vocab_size": self.vocab_size,
            },
        }

    @property
    def draft_shape(self) -> DraftShape:
        """The shape of draft that suits this drafter, as measured when it was made."""
        width = min(self.beam_width, self.draft_vocab_size)
        nodes = self.max_tree_nodes and min(self.max_tree_nodes, 1 + width * self.beam_length)
        return DraftShape(width, self.beam_length, nodes)


@dataclass(frozen=True)
class DraftShape:
    """How far and how wide to draft: W beams of L tokens (the root not counted), verified as at most N tree nodes."""

    beam_width: int = 4
    beam_length: int = 5
    max_tree_nodes: int | None = None

    def __post_init__(self) -> None:
        for name in ("beam_width", "beam_length"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name} is {value!r}, expected an integer")
        _require_at_least(1, self, "beam_width", "beam_length")
        if (most := self.max_tree_nodes) is not None and most < 2:
            raise ValueError(f"max_tree_nodes is {most}, expected at least 2 (the root and one draft token)")

    @property
    def nodes(self) -> int:
        """N: the nodes that are verified in one step, the root included."""
        full = 1 + self.beam_width * self.beam_length
        return full if self.max_tree_nodes is None else min(full, self.max_tree_nodes)
