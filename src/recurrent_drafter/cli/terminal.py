"""What the terminal shows and hears while a drafter trains."""

import signal
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from recurrent_drafter.training.progress import Progress


class TrainingTerminal:
    """Prints a training's sentences, draws a bar for each of its phases, and takes Ctrl-C as a wish once steps begin.

    The first Ctrl-C then ends training after the step at hand, with a checkpoint of it; a second one ends it at once.
    """

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.phase, self.task = "", TaskID(0)
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> "TrainingTerminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, progress: Progress) -> None:
        if progress.done is not None:
            if self.bar is None or progress.phase != self.phase:
                self._open(progress.phase)
            assert self.bar is not None
            self.bar.update(self.task, total=progress.total, completed=progress.done, note=progress.text)
        elif progress.phase != "training" or self.bar is None or not self.bar.console.is_terminal:
            print(progress.text)  # of training, a terminal shows the same beside the bar

    def should_stop(self) -> bool:
        return self.interrupted

    def _open(self, phase: str) -> None:
        self._close()
        self.phase, self.bar = phase, training_bar()
        self.task = self.bar.add_task(phase, total=None, note="")
        self.bar.start()
        if phase == "training":
            self._before = signal.signal(signal.SIGINT, self._note)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None

    def _note(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._before)


def training_bar() -> Bar:
    """One line: what, how far, loss and tokens per step, time."""
    return Bar(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
    )  # fmt: skip
