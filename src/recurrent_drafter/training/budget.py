"""Training by the clock."""

import math
import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TimeBudget(TrainerCallback, ExportableState):
    """Train for some seconds, with the learning rate falling to zero at their end (a cosine of the time spent).

    A resumed training goes on with what its checkpoint says was left.

    Args:
        seconds: from the first step on.
        learning_rate: at the start.
        evaluations: how many, evenly spread; their time counts.
    """

    def __init__(self, seconds: float, learning_rate: float, evaluations: int) -> None:
        self.seconds, self.learning_rate, self.evaluations = seconds, learning_rate, evaluations
        self._begun: float | None = None
        self._evaluated = 0

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return 0.0 if self._begun is None else time.monotonic() - self._begun

    @property
    def share(self) -> float:
        """The part of the time that is spent, at most 1."""
        return min(self.spent / max(self.seconds, 1e-9), 1.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {name: getattr(self, name) for name in ("seconds", "learning_rate", "evaluations")},
            "attributes": {"spent": self.spent, "evaluated": self._evaluated},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, or set it to where the checkpoint's stood."""
        kept = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.seconds = kept["args"]["seconds"]
        self._begun = time.monotonic() - kept["attributes"]["spent"]
        self._evaluated = kept["attributes"]["evaluated"]

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Set this step's learning rate: ten steps of warm-up, then the cosine."""
        warm = min(1.0, (state.global_step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.share))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop when the time is spent; evaluate when the next share of it has passed, without catching up."""
        due = int(self.share * (self.evaluations + 1))
        if self.share >= 1:
            control.should_training_stop = True
        elif due > self._evaluated:
            self._evaluated, control.should_evaluate = due, True
