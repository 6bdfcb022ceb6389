"""What decoding learns as it goes: seconds by draft length, acceptance by what was claimed and by depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from recurrent_drafter.decoding.costs import Floats

PROBE_COST = 0.02  # at most this share of the time goes into steps of lengths that were slower
COMPARE = 64  # steps between those of a shorter length than the best: they tell of times, which change slowly
TRIALS = 4  # steps of each length before judging
MEMORY = 0.05  # weight of the newest observation
COMPARISON = 0.25  # and of one that tells lengths apart
LONGEST_MATCH = 16  # tokens: those that match for longer are as sure
PROMPT, REPLY, EARLIER = range(3)  # where a lookup finds a continuation; earlier: in another reply
KEPT = 2000.0  # observations of a bin beyond which the older half fades


class LengthChoice:
    """Which of a few draft lengths yields tokens fastest at one load.

    Args:
        lengths: of the drafts, 0 (plain autoregression) among them; tried in this order.
        slowness: how many times as long as expected steps take, by length; this before any step, or 0 where the
            first step of each length tells.
    """

    def __init__(self, lengths: Sequence[int], slowness: float = 0.0) -> None:
        self.slowness = dict.fromkeys(lengths, slowness)
        self._seen = dict.fromkeys(lengths, 0)
        self._since = dict.fromkeys(lengths, 0)  # steps of other lengths after the newest of each
        self._newest: int | None = None

    def took(self, length: int, ratio: float) -> None:
        """A step of this length took so many times what was expected.

        After one of the same length that tells of the machine, and all lengths are corrected. After one of another
        length it is a comparison: the machine is the same, so only this length is.
        """
        before = self.slowness[length]
        if before == 0:
            self.slowness[length] = ratio
        elif length == self._newest:
            change = nearer(before, ratio, MEMORY) / before
            self.slowness = {other: change * slowness for other, slowness in self.slowness.items()}
        else:
            self.slowness[length] = nearer(before, ratio, COMPARISON)
        self._seen[length] += 1
        self._newest = length

    def choose(self, tokens: Mapping[int, float], seconds: Mapping[int, float]) -> int:
        """The length for the next step, from what a step of each is expected to yield and to take."""
        chosen = min(tokens, key=self._seen.__getitem__)
        if self._seen[chosen] >= TRIALS:
            chosen = self._fastest_or_due({length: tokens[length] / seconds[length] for length in tokens}, seconds)
        self._since = {length: 0 if length == chosen else since + 1 for length, since in self._since.items()}
        return chosen

    def _fastest_or_due(self, rates: Mapping[int, float], seconds: Mapping[int, float]) -> int:
        """The length of the best rate, or a slower one for which enough time has passed to pay for a step."""
        chosen = best = max(rates, key=rates.__getitem__)
        for length, since in self._since.items():
            lost = seconds[length] * (1 - rates[length] / rates[best])
            pays = PROBE_COST / (len(rates) - 1) * since * seconds[best] >= lost
            if length != best and pays and since >= (1 if length > best else COMPARE):
                chosen = length
        return chosen

    def afresh(self, *, tried: bool = False) -> "LengthChoice":
        """What is known of the machine, for another load; ``tried``: with every length, so that none is tried first."""
        choice = LengthChoice(tuple(self.slowness))
        choice.slowness, choice._newest = dict(self.slowness), self._newest
        if tried:
            choice._seen = dict.fromkeys(self._seen, TRIALS)
        return choice


def logarithms(probabilities: npt.NDArray[Any]) -> Floats:
    """Of probabilities, 0 among them."""
    with np.errstate(divide="ignore"):
        logs: Floats = np.log(probabilities)
    return logs


def nearer(average: float, new: float, weight: float) -> float:
    """A running average with its newest value, which counts as no more than twice or half of it."""
    return average + weight * (min(max(new, average / 2), average * 2) - average)


class AcceptanceCounts:
    """How often draft tokens are accepted, counted in n bins, of which the older half fades.

    It begins with the rates of ``prior`` (n,), which count for as many observations as ``weight`` says.
    """

    def __init__(self, prior: Floats, weight: float) -> None:
        self.trials = np.full(len(prior), weight)
        self.hits = weight * prior

    def add(self, trials: npt.NDArray[Any], hits: npt.NDArray[Any]) -> None:
        self.trials += trials
        self.hits += hits
        if self.trials.max() > KEPT:
            fading = np.where(self.trials > KEPT, 0.5, 1.0)
            self.trials *= fading
            self.hits *= fading


class AcceptanceByClaim(AcceptanceCounts):
    """How often a node is accepted that the drafter gives a cumulative log-probability to.

    Monotone (isotonic regression), so a child is never more probable than its parent. Begins at the drafter's own word.
    """

    EDGES = np.array([-8.0, -6.0, -4.5, -3.5, -2.7, -2.0, -1.5, -1.1, -0.8, -0.55, -0.35, -0.2, -0.1, -0.03])

    MIDDLES = np.concatenate([[-9.0], (EDGES[:-1] + EDGES[1:]) / 2, [-0.015]])

    def __init__(self) -> None:
        super().__init__(np.exp(self.MIDDLES), weight=4.0)
        self._rates: Floats | None = None

    def __call__(self, log_probs: npt.NDArray[Any]) -> Floats:
        return self._by_bin[np.digitize(log_probs, self.EDGES)]

    def claims(self, probabilities: npt.NDArray[Any]) -> Floats:
        """What the drafter would claim of nodes that are accepted this often: log-probabilities."""
        return np.interp(probabilities, self._by_bin, self.MIDDLES)

    @property
    def _by_bin(self) -> Floats:
        if self._rates is None:
            self._rates = isotonic_regression(self.hits / self.trials, weights=self.trials).x
        return self._rates

    def verified(self, log_probs: npt.NDArray[Any], accepted: npt.NDArray[np.bool_]) -> None:
        bins, count = np.digitize(log_probs.ravel(), self.EDGES), len(self.trials)
        self.add(np.bincount(bins, minlength=count), np.bincount(bins, weights=accepted.ravel(), minlength=count))
        self._rates = None


class AcceptanceByDepth(AcceptanceCounts):
    """How often a draft token is accepted where the one before it was, by its depth 1 .. L."""

    def __init__(self, length: int) -> None:
        super().__init__(np.ones(length), weight=1.0)

    def verified(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Of chains of so many tokens each, so many were accepted."""
        lengths, found = np.asarray(drafted), np.asarray(accepted)
        before = np.arange(len(self.hits))[:, None]
        self.add((before < np.minimum(found + 1, lengths)).sum(1), (before < np.minimum(found, lengths)).sum(1))

    @property
    def tokens(self) -> list[float]:
        """Expected tokens of a row in a step, by the length of its draft from 0."""
        return [1.0, *(1.0 + np.cumprod(self.hits / self.trials).cumsum()).tolist()]


class AcceptanceByMatch:
    """How often a token is accepted that was looked up, by where, how many tokens matched, and its rank.

    ``RANKS`` are those of continuations that begin with different tokens, the likeliest first. Begins with what greedy
    replies of a small chat model to questions about code and arithmetic gave.
    """

    RANKS = 3

    def __init__(self) -> None:
        expected = [[max(1 - 0.75 * max(n, 1) ** -0.6, 0.0) for n in range(LONGEST_MATCH + 1)]]
        expected += [[0.1] * (LONGEST_MATCH + 1)] * (self.RANKS - 1)
        self._hits = [[[4 * rate for rate in of_rank] for of_rank in expected] for _ in (PROMPT, REPLY, EARLIER)]
        self._trials = [[[4.0] * len(of_rank) for of_rank in expected] for _ in (PROMPT, REPLY, EARLIER)]

    def __call__(self, source: int, rank: int, matched: int) -> float:
        matched = min(matched, LONGEST_MATCH)
        return self._hits[source][rank][matched] / self._trials[source][rank][matched]

    def verified(self, source: int, rank: int, matched: int, *, accepted: bool) -> None:
        """One more token after a match of this length was looked up there."""
        hits, trials = self._hits[source][rank], self._trials[source][rank]
        hits[matched] += accepted
        trials[matched] += 1
        if trials[matched] > KEPT:
            hits[matched] /= 2
            trials[matched] /= 2
