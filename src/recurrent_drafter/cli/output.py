"""The output folder of a training: whether it can be written to, what to go on from in it, what is left there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.records.paths import check_checkpoint
from recurrent_drafter.training.checkpoints import last_checkpoint


def checkpoint_to_resume(asked: str | None, output: Path) -> str | None:
    """The flag's value, a folder or a truth value, as a checkpoint's folder or None."""
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        check_checkpoint(asked)
        return asked
    newest = last_checkpoint(output)
    print(f"going on from {newest}" if newest else f"no checkpoint in {output}: training begins anew")
    return str(newest) if newest else None


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


def save_drafter(drafter: RecurrentDrafter, output: Path) -> None:
    """Write the drafter's files to the side, then put them in place: an older drafter is never half overwritten."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".saving-") as unfinished:
        drafter.save_pretrained(unfinished)
        for file in Path(unfinished).iterdir():
            file.replace(output / file.name)
