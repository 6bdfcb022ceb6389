"""What is written beside every checkpoint and result, so that it can be made again (layer 4)."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import TrainerCallback

from recurrent_drafter.hardware import hardware

RUN_RECORD = "run.json"
EVALUATION = "evaluation.json"  # of a drafter whose training's record stays beside it
SECRET, STARS = re.compile(r"--(\w+[_-])?token"), "***"


class RunRecord(TrainerCallback):
    """``run.json`` in every checkpoint; tags of ours beside the user's own where the tracker has tags.

    Project, entity, tags and notes are the environment's (``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_TAGS``,
    ``WANDB_NOTES``), as are artifacts and gradients (``WANDB_LOG_MODEL``, ``WANDB_WATCH``): W&B and transformers read
    them. Options and architecture are logged as the trainer's arguments and the model's config.

    Args:
        argv: the command. tags: ours.
        so_far: asked whenever something is written, for what changes meanwhile.
        facts: what else there is to say.
    """

    def __init__(
        self, argv: Sequence[str], tags: Sequence[str], so_far: Callable[[], dict[str, Any]] = dict, **facts: Any
    ) -> None:
        self.argv, self.tags, self.so_far, self.facts = argv, tags, so_far, facts

    def write(self, directory: Path, name: str = RUN_RECORD, **more: Any) -> None:
        """Write it beside something else that is saved."""
        write_run(directory, name, argv=self.argv, **self.facts, **self.so_far(), **more)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add to what the tracker's own callback, which came first, has begun."""
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None and state.is_world_process_zero:
            run.tags = tuple(dict.fromkeys((*(run.tags or ()), *self.tags)))
            run.config.update(
                {name: fact for name, fact in {**self.facts, **self.so_far()}.items() if name != "options"},
                allow_val_change=True,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the checkpoint that has just been written."""
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            self.write(directory, step=state.global_step, best=state.best_metric)


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


def write_run(directory: Path, name: str = RUN_RECORD, *, argv: Sequence[str], **facts: Any) -> None:
    """Write ``run.json``: command, versions, commit and hardware, and whatever else is given."""
    write_json(directory / name, {**provenance(argv), **facts})


def provenance(argv: Sequence[str], device: str | None = None) -> dict[str, Any]:
    """By what command, of which version, on which hardware a result was made."""
    return {
        "argv": without_tokens(argv),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "versions": {
            name: metadata.version(name) for name in ("recurrent-drafter", "torch", "transformers") if _installed(name)
        },
        "hardware": hardware(device),
    }


def without_tokens(argv: Sequence[str]) -> list[str]:
    """A command line whose access tokens (``--token``, ``--hub_token``) are starred."""
    kept: list[str] = []
    for word in argv:
        flag, equals, _ = word.partition("=")
        if kept and SECRET.fullmatch(kept[-1]):
            kept.append(STARS)
        else:
            kept.append(flag + equals + STARS if equals and SECRET.fullmatch(flag) else word)
    return kept


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write all of a file or none of it: under a temporary name first."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(unfinished, path)


def check_writable(path: Path) -> None:
    """Raise OSError, in one line, unless ``path`` can be written as a file; leaves what is there as it is."""
    if path.is_dir():
        raise OSError(f"{path} is a folder: expected the name of a file")
    trial = path.with_name(path.name + ".tmp")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): give a file in a folder that exists and is yours"
        ) from None


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
