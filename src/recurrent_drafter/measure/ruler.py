"""The one ruler. Whatever is compared goes through `Arm`, `interleave`, `judge` and `ratio`.

An arm is a way of answering batches. Arms take turns on the same batches in one process; each arm's output is held
against a reference's, row by row; figures are ratios of what two arms made of the same batch, so that the machine's
moods cancel. What a batch is, prompts, questions or requests, is the arms' business.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recurrent_drafter.measure.divergence import Divergence

# Outcomes of a row. `NOT_COMPARED`: of the same law only, as when transformers samples with noise of its own.
# `OTHER_PROMPT`: an earlier reply of the same conversation differed. `DIFFERENT`: judged by the ids, without a model.
IDENTICAL, TIE, BUG = "identical", "tie", "bug"
NOT_COMPARED, OTHER_PROMPT, DIFFERENT = "not compared", "other prompt", "different"
RESAMPLES, CONFIDENCE = 4000, 0.95
SHORTEST = 1e-9  # seconds that a ratio is made of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What an arm made of a batch.

    Args:
        ids: what each row emitted, through its end token (`until_end`); files keep only how many.
        seconds: of the whole replies, prefill included.
        first_seconds: of a generation that ends with the first token; "decoding only" leaves them out.
        steps: verifications after prefill, of all rows together; None where an arm does not count them.
        drafts: for each row and step, how many tokens were drafted and how many of them accepted.
        sources: for each row, whose draft each token was, as `DecodeStats.sources` says.
        more: what else an arm knows.
    """

    ids: Sequence[Sequence[int]]
    seconds: float
    first_seconds: float = 0.0
    steps: int | None = None
    drafts: Sequence[Sequence[tuple[int, int]]] = ()
    sources: Sequence[Sequence[int]] = ()
    more: Any = None

    @property
    def count(self) -> int:
        return sum(map(len, self.ids))

    @property
    def rate(self) -> float:
        """Tokens per second, prefill included."""
        return self.count / self.seconds if self.seconds else float("nan")

    def speed(self, *, decoding_only: bool = False) -> tuple[float, float]:
        """Tokens, and their seconds; ``decoding_only`` leaves out prefill and each row's first token."""
        if not decoding_only:
            return self.count, self.seconds
        return self.count - len(self.ids), max(self.seconds - self.first_seconds, SHORTEST)


@dataclass(frozen=True)
class Arm:
    """A name and a way of answering a batch; ``is_compared`` is false where the output is of the same law only."""

    name: str
    run: Callable[[Any], Run]
    is_compared: bool = True


@dataclass(frozen=True)
class Verdict:
    """How one row's output compares with the reference's; where it first differs, and by which margin."""

    outcome: str
    margin: float | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Trial:
    """One batch, what every arm made of it (in the arms' order), and how each compares, once that was judged."""

    batch: Any
    runs: Mapping[str, Run]
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)


def interleave(
    arms: Sequence[Arm], batches: Iterable[Any], warm_up: Callable[[Any], Any] = lambda batch: batch, start: int = 0
) -> Iterator[Trial]:
    """Run every arm on every batch; the arms take turns at going first, from the turn of batch ``start`` on.

    Before the first batch each arm runs ``warm_up`` of it: what an arm measures or allocates once is not timed. Batches
    are asked for one by one, so that they may depend on what became of earlier ones.
    """
    for number, batch in enumerate(batches, start):
        if number == start:
            for arm in arms:
                arm.run(warm_up(batch))
        first = number % len(arms)
        runs = {arm.name: arm.run(batch) for arm in [*arms[first:], *arms[:first]]}
        yield Trial(batch, {arm.name: runs[arm.name] for arm in arms})


# A row, the reference's ids and an arm's: where they first differ.
Explain = Callable[[int, Sequence[int], Sequence[int]], Divergence | None]


def judge(run: Run, reference: Run, explain: Explain) -> list[Verdict]:
    """Each row of a run against the reference's: IDENTICAL, a TIE that rounding explains, or a BUG."""
    verdicts = []
    for row, (found, expected) in enumerate(zip(run.ids, reference.ids, strict=True)):
        difference = None if list(found) == list(expected) else explain(row, expected, found)
        if difference is None:
            verdicts.append(Verdict(IDENTICAL))
        else:
            verdicts.append(Verdict(TIE if difference.is_tie else BUG, difference.margin, difference))
    return verdicts


def compare(
    arms: Sequence[Arm], batches: Iterable[Any], explain: Callable[[Any], Explain], start: int = 0
) -> Iterator[Trial]:
    """`interleave`, each trial judged against the first arm that is compared; ``explain`` is made for a batch."""
    reference = next(arm.name for arm in arms if arm.is_compared)
    for trial in interleave(arms, batches, start=start):
        explained, runs = explain(trial.batch), trial.runs
        judged = {
            arm.name: judge(runs[arm.name], runs[reference], explained)
            if arm.is_compared
            else [Verdict(NOT_COMPARED)] * len(runs[arm.name].ids)
            for arm in arms
        }
        yield replace(trial, verdicts=judged)


def verdict(verdicts: Iterable[Verdict]) -> str:
    """All verdicts on an arm in a few words; a tie's margin is the largest of all.

    >>> tie = Verdict("tie", margin=0.125)
    >>> verdict([tie, tie, Verdict("identical")]), verdict([Verdict("identical")]), verdict([tie, Verdict("bug", 3.0)])
    ('ties: 2 (0.12)', 'yes', 'NO: 1')
    """
    judged = list(verdicts)
    counts = Counter(one.outcome for one in judged)
    for outcome, words in ((BUG, "NO"), (DIFFERENT, "different")):
        if counts[outcome]:
            return f"{words}: {counts[outcome]}"
    if counts[NOT_COMPARED]:
        return "same law"
    margins = [one.margin for one in judged if one.outcome == TIE and one.margin is not None]
    largest = f" ({max(margins):.2g})" if margins else ""
    return f"ties: {counts[TIE]}{largest}" if counts[TIE] else "yes"


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, where there is one: a single observation has none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, form: str) -> str:
        """``2.31 (2.20-2.41)``; nothing where there is no figure.

        >>> f"{Estimate(2.309, 2.2, 2.41):.2f}", f"{Estimate(0.5):.0%}", f"{Estimate(float('nan')):.2f}"
        ('2.31 (2.20-2.41)', '50%', '')
        """
        if self.value != self.value:
            return ""
        return f"{self.value:{form}}" + ("" if self.low is None else f" ({self.low:{form}}-{self.high:{form}})")

    @property
    def reach(self) -> tuple[float, float]:
        """How far the interval goes below the figure and above it: a picture's bars."""
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return max(self.value - low, 0.0), max(high - self.value, 0.0)  # an interval need not hold the figure itself

    def named(self, name: str) -> dict[str, float]:
        """As entries ``name``, ``name_low`` and ``name_high``; what is not there is left out."""
        entries = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return {key: value for key, value in entries.items() if value is not None and value == value}


Statistic = Callable[[Floats], Floats]  # of rows (..., n, C) to (...)


def interval(rows: Sequence[Sequence[float]], statistic: Statistic) -> Estimate:  # (n, C)
    """A statistic of rows and its 95 % bootstrap interval: rows are drawn whole, so what belongs together stays so.

    Bias-corrected and accelerated, by `scipy.stats.bootstrap` with a fixed seed; by percentiles where that has no
    answer, as when all rows say the same.

    >>> interval([(4, 2)] * 9, ratio_of_sums)
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    sample = np.asarray(rows, dtype=float)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):  # a draw without a step: no ratio
        value = float(statistic(sample)) if len(sample) else float("nan")
        if not np.isfinite(value):
            return Estimate(float("nan"))
        if len(sample) < 2:
            return Estimate(value)
        from scipy.stats import bootstrap  # takes a second to load

        warnings.simplefilter("ignore")  # scipy's, about what is handled below

        def drawn(places: npt.NDArray[np.int64], axis: int) -> Floats:  # noqa: ARG001  the last one
            return statistic(sample[places])

        options: dict[str, Any] = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "rng": 0}
        found = bootstrap((np.arange(len(sample)),), drawn, vectorized=True, **options)
    low, high = found.confidence_interval
    if not np.isfinite([low, high]).all():
        tail, values = (1 - CONFIDENCE) / 2, found.bootstrap_distribution
        low, high = np.quantile(values[np.isfinite(values)], [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def ratio_of_sums(rows: Floats) -> Floats:  # (..., n, 2) -> (...)
    """All of one column over all of the other."""
    sums = rows.sum(axis=-2)
    return np.asarray(sums[..., 0] / sums[..., 1])


def median_of_ratios(rows: Floats) -> Floats:  # (..., n, 4) -> (...)
    """Of tokens and seconds, an arm's and its base's: the median over the rows of how many times as fast it was."""
    return np.asarray(np.median(rows[..., 0] / rows[..., 1] / (rows[..., 2] / rows[..., 3]), axis=-1))


def ratio_of_rates(rows: Floats) -> Floats:  # (..., n, 4) -> (...)
    """Of the same columns: how many times as fast the arm was over everything."""
    return ratio_of_sums(rows[..., :2]) / ratio_of_sums(rows[..., 2:])


def ratio(
    trials: Sequence[Trial],
    own: str,
    base: str,
    *,
    decoding_only: bool = False,
    statistic: Statistic = median_of_ratios,
) -> Estimate:
    """How many times as fast one arm is as another, with its interval: paired, for a trial is drawn for both at once.

    Trials in which either has emitted nothing (of what counts) say nothing and are left out.
    """
    speeds = [[trial.runs[name].speed(decoding_only=decoding_only) for name in (own, base)] for trial in trials]
    return interval([(*mine, *theirs) for mine, theirs in speeds if mine[0] and theirs[0]], statistic)


def tokens_per_step(trials: Sequence[Trial], arm: str) -> float:
    """Tokens after prefill's own, per verification and row; NaN for an arm that does not count steps."""
    runs = [trial.runs[arm] for trial in trials]
    steps = sum(run.steps or 0 for run in runs)
    return sum(run.count - len(run.ids) for run in runs) / steps if steps else float("nan")


def verdicts_on(trials: Sequence[Trial], arm: str) -> list[Verdict]:
    """Of all rows, in order."""
    return [judged for trial in trials for judged in trial.verdicts.get(arm, ())]


def until_end(reply: Sequence[int], end_ids: Iterable[int]) -> list[int]:
    """What a row emitted, through its first end token: the one counter of every arm.

    >>> until_end([7, 2, 0, 0], end_ids=[2]), until_end([7, 8], end_ids=[2])
    ([7, 2], [7, 8])
    """
    ends = set(end_ids)
    return list(reply[: next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))])


def now() -> float:
    """Seconds, once an accelerator has done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
