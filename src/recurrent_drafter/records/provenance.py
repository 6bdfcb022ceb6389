"""Records beside checkpoints, drafters and results: by what command, code and machine each was made; fingerprints."""

import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.records.paths import written_whole

RUN_RECORD = "run.json"
EVALUATION = "evaluation.json"  # of a drafter whose training's record stays beside it
VERIFICATION_FILE = "verify.json"  # the last verification of a drafter, beside it
MADE_WITH = ("recurrent-drafter", "torch", "transformers")
SECRET, STARS = re.compile(r"--(\w+[_-])?token"), "***"


def provenance(argv: Sequence[str], device: str | None = None) -> dict[str, Any]:
    """By what command, of which version, on which hardware a result was made."""
    return {
        "argv": without_tokens(argv),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "versions": {name: found.version for name in MADE_WITH for found in metadata.distributions(name=name)},
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


def hardware(device: str | None = None) -> dict[str, Any]:
    """Processor or accelerator, and how many threads compute; ``device`` by default cuda where there is one."""
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def peak_bytes() -> int:
    """The most memory that this process ever held, outside accelerators."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path: Path, record: dict[str, Any]) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1, default=str) + "\n")


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


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a JSON line, which is on the disk afterwards."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def resumed_records(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records after the header of a file of JSON lines, which is begun with this header unless it is there.

    A last line that a killed run left half written is taken off. Raises ValueError, saying what differs, where the file
    was begun with other ``settings``, an entry of the header, and for a file of another kind: such files stay as is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        append_record(path, header)
        return []
    try:
        begun, *records = read_records(path, growing=True)
        old = dict(begun["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of a measurement: delete it, or name another file") from None
    new = json.loads(json.dumps(header["settings"]))
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        said = "; ".join(f"{name}: {old.get(name)}, now {new.get(name)}" for name in changed)
        raise ValueError(f"{path} was begun with other settings ({said}): delete it, or name another file")
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return records


def read_records(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """Of a file of JSON lines; of one that is ``growing``, a last line that is not whole yet is left out."""
    text = path.read_text()
    return [json.loads(line) for line in (text[: text.rfind("\n") + 1] if growing else text).splitlines()]


def read_verification(folder: Path) -> dict[str, Any]:
    """What was left of the last verification of the drafter in a folder. Raises ValueError unless it was passed.

    It counts only for the config and the weights that were verified.
    """
    again = f"run recurrent-drafter verify --base_model MODEL --speculator_path {folder}"
    path = folder / VERIFICATION_FILE
    if not path.is_file():
        raise ValueError(f"the drafter at {folder} was never verified: {again}")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        of, bugs = record["drafter"], int(record["bugs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): {again}") from None
    if of != saved_fingerprint(folder):
        raise ValueError(f"{path} is of other weights or another config than the drafter has now: {again}")
    if bugs:
        raise ValueError(f"the last verification of the drafter at {folder} found {bugs} bugs: {again}")
    return record


def hash_of(settings: Mapping[str, Any]) -> str:
    """Of plain settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Of shapes, dtypes and every byte, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def saved_fingerprint(folder: Path) -> str:
    """Of what is saved of a drafter: its config and its weights, as the files are."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def code_fingerprint() -> str:
    """Of this package's source, whether it was committed or not."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The processor's name and what PyTorch uses of it, such as ``AMD EPYC 7763 (AVX2)``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
