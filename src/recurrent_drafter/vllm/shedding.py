"""How many tokens to draft under load: as many as pay, by what steps have taken and yielded so far."""

import time
from collections.abc import Callable
from dataclasses import dataclass

TRIALS = 3  # steps of each length before they are compared
MEMORY = 0.05  # weight of the newest step once there are many
TRIAL = 0.5  # and of one that comes long after the others
PROBE_COST = 0.01  # at most this share of time goes into trying what is slower
STALE = 200  # steps after which a length that was about as fast is tried again


@dataclass
class Steps:
    """Running averages over the engine's steps with drafts of one length: seconds, and tokens per row."""

    seconds: float = 0.0
    tokens: float = 0.0
    seen: int = 0
    since: int = 0  # steps of other lengths after the newest of these

    def add(self, seconds: float, tokens: float) -> None:
        """One step more. A time counts as no more than twice the average: a pause is not the draft's fault."""
        self.seen += 1
        weight = max(1 / self.seen, MEMORY if self.since < STALE else TRIAL)
        self.since = 0
        seconds = min(seconds, 2 * self.seconds) if self.seen > 1 else seconds
        self.seconds += weight * (seconds - self.seconds)
        self.tokens += weight * (tokens - self.tokens)

    @property
    def rate(self) -> float:
        """Tokens per second and row."""
        return self.tokens / self.seconds


class Shedding:
    """Chooses the drafts' length for the next step: the one that has yielded tokens fastest with about so many rows.

    Args:
        length: K, the longest draft; half of it and none at all are the others.
        clock: seconds.
    """

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lengths = sorted({length, (length + 1) // 2, 0}, reverse=True)
        self._clock = clock
        self._loads: dict[int, dict[int, Steps]] = {}  # by the rows' magnitude in powers of two
        self._before: tuple[float, int, int] | None = None  # when the last step was planned, its rows and its length

    def plan(self, rows: int, emitted: int, *, alone: bool) -> int:
        """The length for the next step of so many rows.

        Args:
            rows: requests that got tokens in the step that has just ended.
            emitted: how many tokens they got.
            alone: whether that step did nothing besides, such as reading prompts.
        """
        now = self._clock()
        if self._before is not None and alone and self._before[1] == rows:
            began, _, length = self._before
            self._load(rows)[length].add(now - began, emitted / rows)
        chosen = self._choose(self._load(rows))
        self._before = (now, rows, chosen)
        return chosen

    def _load(self, rows: int) -> dict[int, Steps]:
        return self._loads.setdefault(rows.bit_length(), {length: Steps() for length in self.lengths})

    def _choose(self, load: dict[int, Steps]) -> int:
        for length in self.lengths:
            if load[length].seen < TRIALS:
                return length
        best = max(self.lengths, key=lambda length: load[length].rate)
        for length in self.lengths:
            if length == best:
                continue
            load[length].since += 1
            lost = load[length].seconds - load[length].tokens / load[best].rate
            spent = load[length].since * load[best].seconds
            if load[length].since >= STALE and spent * PROBE_COST >= lost:
                return length
        return best
