"""Paths and repositories that people name: looked at before anything loads; one line says what is wrong with one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TUNING_FILE = "tuning.json"  # beside a drafter, what `tune` found


def is_path(name: str) -> bool:
    """Whether it can only be a path, and no name on the Hub."""
    return name.startswith((".", "/", "~"))


def check_model(name: str) -> None:
    """Raise OSError for the path of a verifier that leads nowhere."""
    if is_path(name) and not Path(name).expanduser().exists():
        raise OSError(f"there is no model at {name}: expected a directory, a hub name or 'demo'")


def check_drafter(path: str) -> None:
    """Raise OSError for a path that leads nowhere, or to no drafter."""
    folder = Path(path).expanduser()
    if is_path(path) and not folder.is_dir():
        raise OSError(f"there is no drafter at {path}: expected the directory that train_speculator.py saved it to")
    if folder.exists() and not (folder / "config.json").is_file():
        raise OSError(f"{path} holds no config.json: expected the directory of a trained drafter")


def check_checkpoint(asked: str) -> None:
    """Raise OSError unless it is a checkpoint's folder, or a truth value: the newest one, or none."""
    if asked.lower() not in ("true", "false") and not (Path(asked) / "trainer_state.json").is_file():
        raise OSError(f"there is no checkpoint at {asked}: give a folder checkpoint-N, or True for the newest one")


def check_readable(path: str, flag: str = "") -> None:
    """Raise OSError unless it can be opened; ``flag`` says what named it."""
    try:
        Path(path).expanduser().open("rb").close()
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be read ({error.strerror})".strip()) from None


def check_writable(path: str | Path) -> None:
    """Raise OSError unless ``path`` can be written as a file; leaves what is there as it is."""
    path = Path(path)
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


def cache_folder() -> Path | None:
    """Where what was learned of this machine is kept: RECURRENT_DRAFTER_CACHE, or a folder of the user's cache.

    None where that is in a home that nobody knows, as in containers.
    """
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("RECURRENT_DRAFTER_CACHE") or f"{users}/recurrent-drafter").expanduser()
    except RuntimeError:
        return None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write a file under, which gets its own name ``path`` once it is whole and on the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_folder(folder: str) -> None:
    """Raise OSError unless files can be written into the folder, or it can be made. Makes nothing."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    wrong = None if there.is_dir() else f"{there} is a file"
    wrong = wrong or (None if os.access(there, os.W_OK) else f"{there} is not yours to write to")
    if wrong is not None:
        raise OSError(f"--output_dir {folder} cannot be written to ({wrong}): give another folder")


def make_writable(folder: str | Path) -> None:
    """Make the folder. Raises OSError where nothing can be written, before a training finds out at its end."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--output_dir {folder} cannot be written to ({error.strerror}): give another folder") from error


def check_repo_name(repo_id: str) -> None:
    """Raise ValueError, in one line, for a name that the Hub would refuse, or one without its owner."""
    from huggingface_hub.utils import validate_repo_id  # takes a while to load

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"not a name for a repository: {str(error).rstrip('.')}; expected user/name") from None
    if "/" not in repo_id:
        raise ValueError(f"the repository {repo_id!r} has no owner: expected user/name or organization/name")


def is_hub_name(name: str) -> bool:
    """Whether a verifier's name can be linked: not the bundled one, and no path."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return name != "demo" and not Path(name).expanduser().exists()
