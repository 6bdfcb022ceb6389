"""How far a long phase is: a bar on a terminal, and in a pipe a line every ten seconds, both on the error stream."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

SECONDS = 10.0  # between two lines
T = TypeVar("T")
# Begins to call a function now and then; what it returns ends that.
Ticking = Callable[[Callable[[], None]], Callable[[], None]]
_open: list["Meter"] = []  # the innermost is shown


def every_ten_seconds(tell: Callable[[], None]) -> Callable[[], None]:
    """Call ``tell`` from a thread of its own: a single thing may take minutes."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(SECONDS):
            tell()

    def stop() -> None:
        ended.set()
        thread.join()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return stop


class Meter:
    """One phase, for as long as its ``with`` block; `update` says how far it is. One within another hides it meanwhile.

    Args:
        said: what is being done.
        total: how much there is to do; None where that is not known.
        unit: what is counted, in the plural; without one what is done is a share of the total.
        console: where; by default the error stream.
        clock: seconds.
        ticking: when lines are due.
    """

    def __init__(
        self,
        said: str,
        total: float | None = None,
        unit: str = "",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        ticking: Ticking = every_ten_seconds,
    ) -> None:
        self.said, self.total, self.unit = said, total, unit
        self.console = console or Console(stderr=True)
        self._clock, self._ticking = clock, ticking
        self._begun, self._first, self._note = 0.0, 0.0, ""
        self.done: float | None = None
        self._bar: Progress | None = None
        self._stop: Callable[[], None] = lambda: None

    def __enter__(self) -> "Meter":
        self._begun = self._clock()
        if _open:
            _open[-1]._hide()
        _open.append(self)
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()
        _open.remove(self)
        if _open:
            _open[-1]._show()

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """So much is done; a ``note`` stands after it."""
        if self.done is None or done < self.done:  # what was there at the beginning took no time
            self._begun, self._first = self._clock(), done
        self.done, self.total, self._note = done, self.total if total is None else total, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total)

    def told(self) -> str:
        """How far it is, how fast, and for how long it goes on."""
        seconds = self._clock() - self._begun
        far = how_far(self.done, self.total, seconds, unit=self.unit, first=self._first)
        return f"{far}  {self._note}".rstrip()

    def _show(self) -> None:
        if not self.console.is_terminal:
            self._stop = self._ticking(self._tell)
            return
        columns = TextColumn("{task.description}", markup=False), BarColumn(), _Told(self)
        to_terminal = sys.stdout.isatty()  # else what is printed is not the terminal's
        self._bar = Progress(*columns, console=self.console, transient=True, redirect_stdout=to_terminal)
        self._task = self._bar.add_task(self.said, total=self.total)
        self._bar.update(self._task, completed=self.done)
        self._bar.start()
        self._stop = self._bar.stop

    def _hide(self) -> None:
        self._stop()

    def _tell(self) -> None:
        self.console.print(f"{self.said}: {self.told()}", markup=False, highlight=False, soft_wrap=True)


def tracked(
    things: Iterable[T],
    said: str,
    unit: str,
    *,
    total: int | None = None,
    counted: Callable[[T], int] = lambda _: 1,
    **how: Any,
) -> Iterator[T]:
    """The things one by one, with a `Meter` of how many are done; one thing may count as several."""
    if total is None and isinstance(things, Sized):
        total = len(things)
    done = 0
    with Meter(said, total, unit, **how) as meter:
        meter.update(done)
        for thing in things:
            yield thing
            done += counted(thing)
            meter.update(done)


def how_far(done: float | None, total: float | None, seconds: float, *, unit: str = "", first: float = 0.0) -> str:
    """The one way of saying it; ``first`` was done when the ``seconds`` began.

    >>> how_far(12, 80, 5.7, unit="prompts")
    '12 of 80, 2.1 prompts/s, 0:32 left'
    >>> how_far(0.25, 1.0, 60), how_far(40, None, 100, unit="texts"), how_far(None, None, 65)
    ('25%, 3:00 left', '40, 0.4 texts/s', '1:05 so far')
    """
    if done is None:
        return f"{minutes(seconds)} so far"
    if total is None:
        parts = [f"{done:,.0f}"]
    else:
        parts = [f"{done:,.0f} of {total:,.0f}" if unit else f"{done / max(total, 1e-9):.0%}"]
    rate = (done - first) / seconds if seconds > 0 else 0.0
    if rate > 0:
        parts += [f"{rate:{',.0f' if rate >= 10 else '.2g'}} {unit}/s"] if unit else []
        parts += [f"{minutes((total - done) / rate)} left"] if total is not None else []
    return ", ".join(parts)


def minutes(seconds: float) -> str:
    """As a clock shows them.

    >>> minutes(41), minutes(3725)
    ('0:41', '1:02:05')
    """
    whole = round(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{hours}:{whole % 60:02}"


class _Told(ProgressColumn):
    """What a line would say, beside the bar."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:
        return Text(self._meter.told())
