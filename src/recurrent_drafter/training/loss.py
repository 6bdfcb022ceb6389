"""What a batch of texts and roots costs the drafter: the loss of the three methods."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafter.core.losses import IGNORED, ChunkLoss, cross_entropy, depth_weights, divergence, draft_labels
from recurrent_drafter.models.verifier import Verifier

LOGITS_AT_A_TIME = {"cpu": 2**24}  # numbers of (roots, K, D): a trade of memory against many small products
LOGITS_ELSEWHERE = 2**28


@dataclass(frozen=True)
class Distillation:
    """Knowledge distillation: ``alpha`` T^2 KL(teacher || student) + (1 - ``alpha``) cross-entropy to the text."""

    temperature: float = 4.0
    alpha: float = 0.7

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"knowledge distillation at temperature {self.temperature} and alpha {self.alpha}: expected a "
                "temperature above 0 and an alpha from 0 to 1"
            )


@dataclass(frozen=True)
class Rows:
    """The roots of a batch as the drafter meets them, and what they are held against."""

    hidden: Tensor  # (P, H), the state that each root was predicted from
    embedded: Tensor  # (P, K, H), of the root and of the targets before each depth's own
    labels: Tensor  # (P, K), targets as numbers of the draft vocabulary, `IGNORED` where none
    counted: Tensor  # (P, K) bool, where there is a target, in the draft vocabulary or not
    states: Tensor  # (B S, H), every position's hidden state
    taught: Tensor  # (P, K), the position among them whose law is the teacher's at each depth


@dataclass(frozen=True)
class Objective:
    """Weighted loss of every depth; ``distillation`` None is cross-entropy alone, whatever the targets are."""

    verifier: Verifier
    draft_ids: Tensor
    gamma: float = 1.0
    distillation: Distillation | None = None

    @torch.no_grad()
    def rows(self, inputs: dict[str, Tensor], dtype: torch.dtype) -> Rows:
        """Read the texts of a batch that `collate` made."""
        rows, positions, targets = inputs["rows"], inputs["positions"], inputs["targets"]
        input_ids = inputs["input_ids"]
        states = self.verifier.hiddens(input_ids, inputs["attention_mask"])
        hidden = states[rows, positions - 1]
        _, length, _ = states.shape
        read = torch.cat([input_ids[rows, positions][:, None], targets[:, :-1]], dim=1).clamp(min=0)
        # Depth k = 1 .. K is position p + k - 1 of the text: where its target lies in the text, so does this.
        ahead = torch.arange(targets.shape[1], device=positions.device)
        taught = (positions[:, None] + ahead).clamp(max=length - 1) + rows[:, None] * length
        labels = draft_labels(targets, self.draft_ids, self.verifier.vocab_size)
        embedded = self.verifier.embed(read)
        return Rows(hidden.to(dtype), embedded.to(dtype), labels, targets != IGNORED, states.flatten(0, 1), taught)

    def counts(self, targets: Tensor) -> Tensor:  # (P, K) -> (2, K)
        """How many targets each depth has, and how many of them the draft vocabulary holds."""
        labels = draft_labels(targets.to(self.draft_ids.device), self.draft_ids, self.verifier.vocab_size)
        return torch.stack([(targets != IGNORED).sum(0).to(labels.device), (labels != IGNORED).sum(0)])

    def chunk_loss(self, rows: Rows, counts: Tensor) -> ChunkLoss:
        """A chunk's share of the loss of all that ``counts`` (2, K) counted, this batch and others."""
        by_all, by_labels = (depth_weights(row, self.gamma) for row in counts)
        alpha = self.distillation.alpha if self.distillation is not None else 0.0

        def loss(logits: Tensor, some: slice) -> Tensor:
            total = (1 - alpha) * (by_labels * cross_entropy(logits, rows.labels[some])).sum()
            if self.distillation is None:
                return total
            counted, temperature = rows.counted[some], self.distillation.temperature
            teacher = self._teacher(rows, some)
            return total + alpha * (by_all * divergence(logits, teacher, counted, temperature)).sum()

        return loss

    @torch.no_grad()
    def _teacher(self, rows: Rows, some: slice) -> Tensor:  # (c, K, D)
        """The verifier's logits over the draft vocabulary. Neighboring roots share positions: each is read once."""
        positions, place = rows.taught[some].unique(return_inverse=True)
        logits = self.verifier.logits(rows.states[positions])[:, self.draft_ids]
        return logits[place]


def roots_at_a_time(draft_ids: Tensor, depths: int) -> int:
    """How many roots' logits may exist together."""
    logits = LOGITS_AT_A_TIME.get(draft_ids.device.type, LOGITS_ELSEWHERE)
    return max(1, logits // (depths * len(draft_ids)))
