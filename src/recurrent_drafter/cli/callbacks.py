"""What the terminal shows and hears while a drafter trains."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from recurrent_drafter.training.budget import TimeBudget


def progress_bar() -> Progress:
    """One line: what, how far, loss and tokens per step, time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )  # fmt: skip


class StopWhenInterrupted(TrainerCallback):
    """Ctrl-C ends training behind the step at hand, with a checkpoint of it; a second Ctrl-C ends it at once.

    A checkpoint from the middle of a step would hold weights that no uninterrupted run ever has.
    """

    def __init__(self) -> None:
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C as a wish, not as an exception."""

        def note(*_: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, if asked to."""
        if self.interrupted:
            control.should_save = control.should_training_stop = True


class ShowProgress(TrainerCallback):
    """The training's bar: loss, and held-out tokens per step as it rises."""

    def __init__(self, progress: Progress, budget: TimeBudget | None) -> None:
        self.progress, self.budget = progress, budget
        self.task = progress.add_task("training", total=None, note="")
        self.loss: float | None = None
        self.acceptance: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self.budget is None:
            self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        else:
            self.progress.update(self.task, total=1.0, completed=self.budget.share)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the newest figures; a terminal redraws them, a log file gets a line per evaluation."""
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        notes = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if "eval_tokens_per_step" in logs:
            self.acceptance.append(f"{logs['eval_tokens_per_step']:.2f}")
            if not self.progress.console.is_terminal:
                print(", ".join([f"step {state.global_step}: held-out tokens/step {self.acceptance[-1]}", *notes]))
        if self.acceptance:
            notes.append(f"held-out tokens/step {' > '.join(self.acceptance[-4:])}")
        self.progress.update(self.task, note="  ".join(notes))
