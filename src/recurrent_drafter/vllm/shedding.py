"""How many tokens to draft under load: as many as pay, by what steps take and what is accepted lately."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TRIALS = 3  # steps in a row that a length is tried for
MEMORY = 0.05  # weight of the newest step's time once there are many
RENEWED = 0.5  # and of one that comes long after the others
FIRST_WAIT, LONGEST_WAIT = 25, 800  # steps between trials of what is slower; each that finds it so doubles them
TRIAL_COST = 0.01  # at most this share of time goes into trials of each other length
# What drafting has to gain for each doubling of the rows: it slows down steps that read prompts too, which are not
# timed, and drafts go beyond the end of a reply.
MARGIN = 0.06
KEPT = 2000.0  # draft tokens of a position beyond which the older half fades


@dataclass
class Steps:
    """What the engine's steps with drafts of one length have taken, and when they are tried next."""

    seconds: float = 0.0
    seen: int = 0
    since: int = 0  # steps of other lengths after the newest of these
    wait: int = FIRST_WAIT
    left: int = 0  # steps of a trial that has begun

    def add(self, seconds: float) -> None:
        """One more. It counts as no more than twice the average: a pause is not the draft's fault."""
        self.seen += 1
        weight = max(1 / self.seen, MEMORY if self.since < FIRST_WAIT else RENEWED)
        self.seconds += weight * ((min(seconds, 2 * self.seconds) if self.seen > 1 else seconds) - self.seconds)
        self.since = 0


class Acceptance:
    """How often a draft token is accepted where the one before it was, by its position."""

    def __init__(self, length: int) -> None:
        self.hits, self.trials = np.ones(length), np.ones(length)

    def add(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Of drafts of so many tokens each, so many were accepted."""
        lengths, found = np.asarray(drafted), np.asarray(accepted)
        position = np.arange(len(self.hits))[:, None]
        self.trials += (position < np.minimum(found + 1, lengths)).sum(1)
        self.hits += (position < np.minimum(found, lengths)).sum(1)
        if self.trials.max() > KEPT:
            fading = np.where(self.trials > KEPT, 0.5, 1.0)
            self.hits, self.trials = self.hits * fading, self.trials * fading

    @property
    def tokens(self) -> list[float]:
        """Expected tokens of a request in a step, by the length of its draft from 0."""
        return [1.0, *(1.0 + np.cumprod(self.hits / self.trials).cumsum()).tolist()]


class Shedding:
    """Chooses the drafts' length for the next step: the one that is expected to yield tokens fastest at this load.

    Args:
        length: K, the longest draft; half of it and none at all are the others.
        clock: seconds.
    """

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lengths = sorted({length, (length + 1) // 2, 0}, reverse=True)
        self.acceptance = Acceptance(length)
        self._clock = clock
        self._loads: dict[int, dict[int, Steps]] = {}  # by the rows' magnitude in powers of two
        self._before: tuple[float, int, int] | None = None  # when the last step was planned, its rows and its length

    def plan(self, drafted: Sequence[int], emitted: Sequence[int], *, alone: bool) -> int:
        """The length for the next step.

        Args:
            drafted: how many draft tokens each request had verified in the step that has just ended.
            emitted: how many tokens it got, at least one each.
            alone: whether that step did nothing besides, such as reading prompts.
        """
        now, rows = self._clock(), len(emitted)
        self.acceptance.add(drafted, [tokens - 1 for tokens in emitted])
        load = self._loads.setdefault(rows.bit_length(), {length: Steps() for length in self.lengths})
        if self._before is not None and alone and self._before[1] == rows:
            load[self._before[2]].add(now - self._before[0])
        chosen = self._choose(load, 1 + MARGIN * math.log2(max(rows, 1)))
        self._before = (now, rows, chosen)
        return chosen

    def _choose(self, load: dict[int, Steps], margin: float) -> int:
        for length, steps in load.items():
            if steps.seen < TRIALS:
                return length
        tokens = self.acceptance.tokens
        tokens[0] = margin
        rates = {length: tokens[length] / steps.seconds for length, steps in load.items()}
        best = max(rates, key=rates.__getitem__)
        for length, steps in load.items():
            if length == best:
                steps.left, steps.wait = 0, FIRST_WAIT  # should it fall behind, it is tried again soon
                continue
            if steps.left > 0:
                steps.left -= 1
                return length
            steps.since += 1
            lost = steps.seconds * (1 - rates[length] / rates[best])
            if steps.since >= steps.wait and TRIALS * lost <= TRIAL_COST * steps.since * load[best].seconds:
                steps.left, steps.wait = TRIALS - 1, min(2 * steps.wait, LONGEST_WAIT)
                return length
        return best
