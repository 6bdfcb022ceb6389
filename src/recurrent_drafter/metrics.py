"""What is measured, defined once (layer 1).

``n_accepted`` counts the draft tokens accepted in a step, without the bonus token; ``tokens_per_step`` is the mean of
``n_accepted + 1`` over the steps after prefill. Prefill's own pass and token are not counted, and the last step counts
the tokens that were emitted.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Walk:
    """Steps that decoding would take along known replies, and the tokens that they emit."""

    steps: int
    tokens: int

    def __add__(self, other: "Walk") -> "Walk":
        return Walk(self.steps + other.steps, self.tokens + other.tokens)

    @property
    def tokens_per_step(self) -> float:
        """Tokens over steps; NaN without a step."""
        return self.tokens / self.steps if self.steps else float("nan")


def walk(n_accepted: list[int]) -> Walk:
    """Jump along one reply as decoding would (DESIGN: acceptance without decoding).

    Args:
        n_accepted: entry i is what a draft with the reply's token i as its root would have accepted.

    The reply's first token is prefill's; its last is nobody's root because nothing follows it. A jump that would pass
    the end emits only what is left.

    >>> walk([2, 0, 0, 1, 0])     # 5 tokens, the first from prefill: root 0 emits 3, root 3 emits the last
    Walk(steps=2, tokens=4)
    """
    return Walk(len(visited(n_accepted)), max(len(n_accepted) - 1, 0))


def visited(n_accepted: list[int]) -> list[int]:
    """The roots that `walk` drafts from.

    >>> visited([2, 0, 0, 1, 0])
    [0, 3]
    """
    roots, position = [], 0
    while position < len(n_accepted) - 1:
        roots.append(position)
        position += n_accepted[position] + 1
    return roots


def median_interval(values: list[float], *, confidence: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap interval of the median (percentile method, fixed resampling seed)."""
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).choice(sample, size=(resamples, sample.size))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
