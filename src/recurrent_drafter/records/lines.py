"""Files of JSON lines: one record each, written as they come."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write JSON lines as they come, under a temporary name until all have come; return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    written = []
    with unfinished.open("w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            file.flush()
            written.append(record)
    unfinished.replace(path)
    return written


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
