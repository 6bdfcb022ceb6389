"""Experiment trackers: Weights & Biases, TensorBoard and whatever else accelerate knows."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


@contextmanager
def closing_trackers() -> Iterator[None]:
    """Finish what the trackers have begun, as failed if an error comes through; OSError for one of W&B's own."""
    code = 1
    try:
        yield
        code = 0
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise OSError(f"Weights & Biases: {error} (`wandb login` once, or WANDB_MODE=offline)") from error
    finally:
        wandb = sys.modules.get("wandb")
        if getattr(wandb, "run", None) is not None:
            wandb.finish(exit_code=code)  # type: ignore[union-attr]


def check_services(asked: Sequence[str], available: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed here."""
    for service in asked:
        if service not in available:
            raise ValueError(
                f"--report_to {service}: no such service is installed here (pip install {service}?); "
                f"there is {', '.join([*available, 'none'])}"
            )


def evaluation_services() -> list[str]:
    """Trackers that an evaluation can report to here: those of accelerate that are installed."""
    return [str(getattr(service, "value", service)) for service in get_available_trackers()]


@contextmanager
def reporting_to(
    services: Sequence[str], *, run_name: str, project: str | None, settings: dict[str, Any]
) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Begin a run at each service, told the settings; gives a function that logs figures, at a step, to all of them.

    ``project`` is W&B's, by default the environment's. TensorBoard's files go to ``runs/run_name``, or to
    TENSORBOARD_LOGGING_DIR. Without services nothing happens.
    """
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    trackers = []
    if services:
        PartialState()  # without it accelerate's own log, which its trackers write to, raises an error
    with closing_trackers():
        for service in services:
            make: Any = LOGGER_TYPE_TO_CLASS[service]
            if service == "wandb":
                tracker = make(project or os.environ.get("WANDB_PROJECT", "recurrent-drafter"), name=run_name)
            elif make.requires_logging_directory:
                tracker = make(run_name, os.environ.get("TENSORBOARD_LOGGING_DIR", "runs"))
            else:
                tracker = make(run_name)
            tracker.start()
            tracker.store_init_configuration(plain)
            trackers.append(tracker)

        def log(figures: dict[str, float], step: int) -> None:
            for tracker in trackers:
                tracker.log(figures, step=step)

        yield log
        for tracker in trackers:
            tracker.finish()
