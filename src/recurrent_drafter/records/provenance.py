"""The record beside every checkpoint and result: by what command, code and machine it was made."""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from recurrent_drafter.records.hardware import hardware

RUN_RECORD = "run.json"
EVALUATION = "evaluation.json"  # of a drafter whose training's record stays beside it
SECRET, STARS = re.compile(r"--(\w+[_-])?token"), "***"


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
