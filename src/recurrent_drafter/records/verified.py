"""What a verification leaves beside a drafter."""

import json
from pathlib import Path
from typing import Any

from recurrent_drafter.records.hashes import saved_fingerprint

VERIFICATION_FILE = "verify.json"  # the last verification of a drafter, beside it


def read_verification(folder: Path) -> dict[str, Any]:
    """What was left of the last verification of the drafter in a folder. Raises ValueError unless it was passed.

    It counts only for the config and the weights that were verified.
    """
    again = f"run recurrent-drafter verify --base_model MODEL --speculator_path {folder}"
    path = folder / VERIFICATION_FILE
    if not path.is_file():
        raise ValueError(f"the drafter at {folder} was never verified: {again}")
    try:
        record = json.loads(path.read_text())
        of, bugs = record["drafter"], int(record["bugs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): {again}") from None
    if of != saved_fingerprint(folder):
        raise ValueError(f"{path} is of other weights or another config than the drafter has now: {again}")
    if bugs:
        raise ValueError(f"the last verification of the drafter at {folder} found {bugs} bugs: {again}")
    verified: dict[str, Any] = record
    return verified
