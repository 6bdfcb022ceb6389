"""What is written beside every checkpoint and result, so that it can be made again (layer 4)."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def write_run(directory: Path, *, argv: Sequence[str], **facts: Any) -> None:
    """Write ``run.json``: command, versions, commit and hardware, and whatever else is given."""
    record = {**circumstances(argv), **facts}
    path = directory / "run.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(unfinished, path)


def circumstances(argv: Sequence[str]) -> dict[str, Any]:
    """What a result depends on besides its options: command, date, commit, versions, hardware."""
    return {
        "argv": list(argv),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "versions": {
            name: metadata.version(name) for name in ("recurrent-drafter", "torch", "transformers") if _installed(name)
        },
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor or accelerator, and how many threads compute."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "system": platform.system()}


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
