"""Checkpoints that are whole or not there, and of one run; and the folder that they and the drafter lie in."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from recurrent_drafter.records.paths import check_checkpoint

UNFINISHED = ".unfinished"
RUN = "run_fingerprint.json"
STATE = "trainer_state.json"
SHARDED = "pytorch_model_fsdp.bin"  # what FSDP resumes from, beside the plain weights


class WholeCheckpoints(Trainer):
    """A Trainer that writes each checkpoint under a temporary name and renames it.

    Trainer (5.19) itself writes file by file into the final folder, where a kill leaves half a checkpoint, or half of
    an older one overwritten. Weights that are not numbers are never written. With a ``fingerprint``, a checkpoint of
    another run is refused. All processes end with the same weights, the best checkpoint's where that is asked for.
    """

    fingerprint: str | None = None
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise ValueError(
                f"the drafter's weights are not numbers after step {step}: {self.advice()}; nothing was saved over it"
            )
        folder = Path(self._get_output_dir(trial))
        self._staging = folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step == step or best.exists():  # every process must know which to end with
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._put_in_place(folder, f"checkpoint-{step}")
        except BaseException:
            if self.args.should_save:  # half a checkpoint on a full disk is in the way
                shutil.rmtree(self._staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder / f"checkpoint-{step}"))
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, folder: Path, name: str) -> None:
        unfinished, final = folder / UNFINISHED / name, folder / name
        self.state.save_to_json(str(unfinished / STATE))
        (unfinished / RUN).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")
        if final.exists():  # of an earlier life of this run
            final.rename(folder / UNFINISHED / "older")
        unfinished.rename(final)
        shutil.rmtree(folder / UNFINISHED)
        best_folder = self.state.best_model_checkpoint
        rotate_checkpoints(str(folder), self.args.save_total_limit, best_folder, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else not in its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept = Path(resume_from_checkpoint) / RUN
        theirs = json.loads(kept.read_text())["fingerprint"] if kept.is_file() else None
        if None not in (theirs, self.fingerprint) and theirs != self.fingerprint:
            raise ValueError(
                f"{resume_from_checkpoint} belongs to another run (other data, verifier or settings): resume with what "
                "it was begun with, or give another output folder"
            )
        if self.is_fsdp_enabled and not (Path(resume_from_checkpoint) / SHARDED).is_file():
            raise ValueError(f"{resume_from_checkpoint} was saved without --fsdp: resume it without, as it was begun")
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which load on all processes together
            # The file lies where the main process can read it, if nowhere else.
            broadcast(self.model.state_dict())  # type: ignore[union-attr]

    def advice(self) -> str:
        """What is left of a training that went wrong, and what may help."""
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        left = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return f"{left}; a lower --learning_rate or --max_grad_norm may help"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a training, by time: an older run may have left higher numbers."""
    complete = [path for path in directory.glob(f"checkpoint-*/{STATE}") if _readable(path)]
    newest = max(complete, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest and newest.parent


def _readable(state: Path) -> bool:
    """Whether a trainer's state is whole; it is the last file that a Trainer writes into a checkpoint."""
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(asked: str | bool | None, output: Path) -> str | None:
    """The option's value, a folder or a truth value, as a checkpoint's folder or None."""
    asked = str(asked)
    if asked.lower() in ("none", "false"):
        return None
    if asked.lower() == "true":
        newest = last_checkpoint(output)
        return str(newest) if newest else None
    check_checkpoint(asked)
    return asked


@contextmanager
def saying_what_was_not_written(output: Path) -> Iterator[None]:
    """Turn the several ways in which torch, safetensors and the system report a full disk into one OSError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        unwritten = ("No space", "too large", "quota", "file write", "PytorchStreamWriter", "unexpected pos")
        if not any(sign in text for sign in unwritten):
            raise
        whole = last_checkpoint(output)
        kept = f"{whole} is whole: make room, then go on with --resume_from_checkpoint True" if whole else "make room"
        raise OSError(f"what training keeps in {output} could not be written ({text[:120]}); {kept}") from error
