"""Tokens per step of several trainings on the same replies, and how sure a difference between two methods is.

What varies is which prompts were held out and which seed a training had. Both are crossed: every training meets every
reply. So an interval is found by drawing replies with replacement, the same for all trainings, and seeds with
replacement, the same for both methods, over and over (the bootstrap of crossed data: Owen, "The pigeonhole bootstrap",
2007). A reply is the unit, not a step of it: steps along one reply are not independent of each other.
"""

from dataclasses import dataclass

import numpy as np

from recurrent_drafter.measure.ruler import CONFIDENCE, RESAMPLES, Estimate, Floats


@dataclass(frozen=True)
class Walks:
    """Steps (seeds, replies) that trainings take along the same replies, and the tokens (replies) that these hold."""

    steps: Floats
    tokens: Floats

    @property
    def tokens_per_step(self) -> float:
        return float(len(self.steps) * self.tokens.sum() / self.steps.sum())

    @property
    def of_each_seed(self) -> list[float]:
        return [float(self.tokens.sum() / steps.sum()) for steps in self.steps]


def says(ratio: Estimate) -> str:
    """What a ratio with its interval says: ``more``, ``fewer`` or ``undecided``."""
    if ratio.low is None or ratio.high is None:
        return "undecided"
    return "more" if ratio.low > 1 else "fewer" if ratio.high < 1 else "undecided"


def tokens_per_step(walks: Walks) -> Estimate:
    """Of one method.

    >>> tokens_per_step(Walks(np.array([[2.0, 2.0, 2.0]]), np.array([4.0, 4.0, 4.0])))
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    return _estimate(walks.tokens_per_step, _resampled(walks))


def gain(walks: Walks, base: Walks) -> Estimate:
    """The ratio of tokens per step of two methods, paired by reply and by seed."""
    return _estimate(walks.tokens_per_step / base.tokens_per_step, _resampled(walks) / _resampled(base))


def _resampled(walks: Walks) -> Floats:  # (RESAMPLES,)
    """Tokens per step of samples drawn anew; the same draws for data of the same shape, which is what pairs two."""
    seeds, replies = walks.steps.shape
    generator = np.random.default_rng(0)
    of_reply = generator.multinomial(replies, np.full(replies, 1 / replies), RESAMPLES)
    of_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    steps = np.einsum("ns,sr,nr->n", of_seed, walks.steps, of_reply)
    return np.asarray(seeds * (of_reply @ walks.tokens) / steps)


def _estimate(value: float, resampled: Floats) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))
