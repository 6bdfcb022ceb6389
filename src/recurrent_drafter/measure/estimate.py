"""What a drafter can gain and what it costs, before there is one.

A step drafts L tokens and verifies n nodes. It pays when it yields more tokens than the plain steps that would have
fit into its time: the *break-even*, (t(n) + L t_level) / t(1). Before anything can be measured, the same from weights
alone: a step of few rows takes as long as reading the weights does, the verifier's once and the drafter's L times.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

TYPICAL_RATE = 0.8  # how often a draft token is accepted that the draft vocabulary holds, given that its parent was


@dataclass(frozen=True)
class WeightsRead:
    """Numbers that are read from memory: by a step of the verifier, by one drafted level without head, per head row."""

    verifier: int
    level: int
    head_row: int

    def break_even(self, draft_vocab_size: int, levels: int) -> float:
        """Tokens per step from which on drafting pays, if reading weights were all that takes time.

        >>> round(WeightsRead(124_000_000, 5_900_000, 1536).break_even(50_257, 4), 2)     # GPT-2 small, E = 2 H
        3.68
        """
        return 1 + levels * (self.level + self.head_row * draft_vocab_size) / self.verifier


def weights_read(verifier: Verifier, exit_dim: int, num_draft_layers: int, *, rnn: bool) -> WeightsRead:
    """Of this verifier (an embedding that is only looked up in is not read) and a drafter of this architecture."""
    model, width = verifier.model, verifier.hidden_size
    total = sum(parameter.numel() for parameter in model.parameters())
    if model.get_input_embeddings().weight is not verifier.head.weight:
        total -= sum(parameter.numel() for parameter in verifier.embedding.parameters())
    projected = 2 * width * exit_dim if exit_dim != 2 * width else 0
    recurrence = 2 * width * width if rnn else 0
    return WeightsRead(total, recurrence + projected + num_draft_layers * exit_dim * exit_dim, exit_dim)


def expected_tokens(rate: float, levels: int) -> float:
    """Tokens per step when each of ``levels`` draft tokens is accepted with ``rate`` once its parent was.

    >>> expected_tokens(0.5, 2)
    1.75
    """
    return float(sum(rate**level for level in range(levels + 1)))


def expected_coverage(counts: Tensor) -> Tensor:  # (V,) -> (V,)
    """The share of text yet unseen that the most frequent 1, 2, ..., V tokens of a sample cover.

    What share is of tokens that the sample has at most once is known from those it has once (Good and Turing); it is
    spread over all of them evenly. Without that a small sample seems to be covered by the few tokens that occur in it.

    >>> import torch
    >>> expected_coverage(torch.tensor([6, 1, 1, 0, 0])).tolist()      # 6/8, and a quarter of 2/8 for each other token
    [0.75, 0.8125, 0.875, 0.9375, 1.0]
    """
    ordered = counts.double().sort(descending=True).values
    rare = ordered <= 1
    ordered[rare] = (ordered[rare].sum() / rare.sum()) if rare.any() else 0.0
    return ordered.cumsum(0) / ordered.sum().clamp(min=1e-9)


def choose_draft_vocabulary(coverage: Tensor, weights: WeightsRead, levels: int) -> int:
    """D with the best speed by weights read: tokens per step, less what is not covered, over the break-even.

    It is a power of two from 256 on, or V. ``coverage`` (V,) is the share of the targets that the most frequent 1, 2,
    ..., V tokens are; those within the draft vocabulary are accepted at `TYPICAL_RATE`.
    """
    (vocabulary,) = coverage.shape
    sizes = [2**power for power in range(8, 40) if 2**power < vocabulary] + [vocabulary]

    def speed(size: int) -> float:
        return expected_tokens(TYPICAL_RATE * float(coverage[size - 1]), levels) / weights.break_even(size, levels)

    return max(sizes, key=speed)


def break_even(costs: Costs, shape: DraftShape) -> float:
    """Tokens per step from which on this shape pays, by measured times: at more it is faster by their ratio."""
    return costs.step(shape) / costs.step(None)


def ceiling(costs: Costs, rate: float, most_levels: int) -> tuple[float, int]:
    """The best speed-up at an acceptance ``rate`` per draft token, and the draft length that gives it.

    Of one beam; 1.0 and 0 where no length pays.
    """
    best = (1.0, 0)
    for levels in range(1, most_levels + 1):
        gain = expected_tokens(rate, levels) / break_even(costs, DraftShape(1, levels))
        best = max(best, (gain, levels))
    return best


def best_lookup(costs: Costs, tokens_per_step: Mapping[int, float]) -> tuple[float, int]:
    """The best speed-up of lookup alone, by what it yields with so many nodes, and these; 1.0 and 1 if none pays."""
    plain = costs.step(None)
    return max((tokens * plain / float(costs.verifying(n)), n) for n, tokens in {1: 1.0, **tokens_per_step}.items())


def training_bytes(drafter: RecurrentDrafter, verifier: Verifier) -> int:
    """Weights, gradients and Adam's two moments of the drafter in float32, and the verifier's weights."""
    kept = sum(parameter.numel() * parameter.element_size() for parameter in verifier.model.parameters())
    return 16 * sum(parameter.numel() for parameter in drafter.parameters()) + kept
