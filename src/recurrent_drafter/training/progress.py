"""What a training tells its caller, and how the caller asks it to stop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainerCallback

from recurrent_drafter.training.budget import TimeBudget
from recurrent_drafter.training.options import BEST

logger = logging.getLogger(__name__)
Phase = Literal["data", "verifier's own text", "distilling", "targets", "evaluation", "training"]


@dataclass(frozen=True)
class Progress:
    """A sentence for people or, with ``done``, how far a phase is.

    ``total`` is None where the end is not known; ``text`` then is a note beside the count, such as the newest loss.
    """

    phase: Phase
    text: str = ""
    done: float | None = None
    total: float | None = None

    def __str__(self) -> str:
        if self.done is None:
            return self.text
        far = f"{self.done:g}" if self.total is None else f"{self.done / max(self.total, 1e-9):.0%}"
        return f"{self.phase}: {far}  {self.text}".rstrip()


OnProgress = Callable[[Progress], None]
ShouldStop = Callable[[], bool]


def log_progress(progress: Progress) -> None:
    """Log sentences as information, counts for debugging."""
    logger.log(logging.INFO if progress.done is None else logging.DEBUG, "%s", progress)


def never() -> bool:
    """No, do not stop."""
    return False


class CallerAnswers(TrainerCallback):
    """Tells the caller of every step and evaluation, and asks after each step whether to stop.

    A stop ends training with a checkpoint of that step: one from the middle of a step would hold weights that no
    uninterrupted run ever has.
    """

    def __init__(self, tell: OnProgress, should_stop: ShouldStop = never, budget: TimeBudget | None = None) -> None:
        self.tell, self.should_stop, self.budget = tell, should_stop, budget
        self.stopped = False
        self.loss: list[str] = []
        self.acceptance: list[str] = []

    def _say_how_far(self, state: Any) -> None:
        done, total = (state.global_step, state.max_steps) if self.budget is None else (self.budget.share, 1.0)
        rising = [f"held-out tokens/step {' > '.join(self.acceptance[-4:])}"] if self.acceptance else []
        self.tell(Progress("training", "  ".join([*self.loss, *rising]), done, total))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that steps begin."""
        self._say_how_far(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how far training is, in steps or in time; save and stop, if asked to."""
        self._say_how_far(state)
        if self.should_stop():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Keep the newest figures; an evaluation is a sentence."""
        logs = logs or {}
        if "loss" in logs:
            self.loss = [f"loss {logs['loss']:.3f}"]
        if BEST in logs:
            self.acceptance.append(f"{logs[BEST]:.2f}")
            evaluated = f"step {state.global_step}: held-out tokens/step {self.acceptance[-1]}"
            self.tell(Progress("training", ", ".join([evaluated, *self.loss])))
