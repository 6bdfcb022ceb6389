"""What runs beside a training: the caller's ear and word, the clock, and ``run.json`` in every checkpoint."""

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from recurrent_drafter.records.provenance import RUN_RECORD, hash_of, provenance, write_json
from recurrent_drafter.training.arguments import TrainingArguments
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


def counting(phase: Phase, tell: OnProgress) -> Callable[[float, float], None]:
    """What tells of a phase how much is done, and of how much."""
    return lambda done, total: tell(Progress(phase, done=done, total=total))


def log_progress(progress: Progress) -> None:
    """Log sentences as information, counts for debugging."""
    logger.log(logging.INFO if progress.done is None else logging.DEBUG, "%s", progress)


def never() -> bool:
    return False


class TimeBudget(TrainerCallback, ExportableState):
    """Train for ``seconds``, in which the learning rate falls to zero (a cosine of the time spent).

    ``evaluations`` are spread evenly, and their time counts. A resumed training goes on with what its checkpoint says
    was left.
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done, total = (state.global_step, state.max_steps) if self.budget is None else (self.budget.share, 1.0)
        rising = [f"held-out tokens/step {' > '.join(self.acceptance[-4:])}"] if self.acceptance else []
        self.tell(Progress("training", "  ".join([*self.loss, *rising]), done, total))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_train_begin(args, state, control)
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
            self.on_train_begin(args, state, control)  # beside the bar too, which may not move again


class RunRecord(TrainerCallback):
    """``run.json`` in every checkpoint; tags of ours beside the user's own where the tracker has tags.

    Project, entity, tags and notes are the environment's (``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_TAGS``,
    ``WANDB_NOTES``), as are artifacts and gradients (``WANDB_LOG_MODEL``, ``WANDB_WATCH``): W&B and transformers read
    them. Options and architecture are logged as the trainer's arguments and the model's config. ``so_far`` is asked
    whenever something is written, for facts that change meanwhile.
    """

    def __init__(
        self, argv: Sequence[str], tags: Sequence[str], so_far: Callable[[], dict[str, Any]] = dict, **facts: Any
    ) -> None:
        self.argv, self.tags, self.so_far, self.facts = argv, tags, so_far, facts

    def write(self, directory: Path, name: str = RUN_RECORD, **more: Any) -> None:
        write_json(directory / name, {**provenance(self.argv), **self.facts, **self.so_far(), **more})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add to what the tracker's own callback, which came first, has begun."""
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None and state.is_world_process_zero:
            run.tags = tuple(dict.fromkeys((*(run.tags or ()), *self.tags)))
            config = {name: fact for name, fact in {**self.facts, **self.so_far()}.items() if name != "options"}
            run.config.update(config, allow_val_change=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            self.write(directory, step=state.global_step, best=state.best_metric)


def facts(args: TrainingArguments) -> dict[str, Any]:
    """What ``run.json`` and the trackers are told besides the trainer's own arguments."""
    options = {name: value for name, value in args.to_dict().items() if not name.startswith("_")}
    told = {"verifier": args.llm_name_or_path, "method": args.method, "seed": args.seed}
    return {**told, "settings_hash": hash_of(options), "options": options}
