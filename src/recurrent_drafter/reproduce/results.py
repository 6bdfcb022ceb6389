"""The folder of a reproduction: what it was asked for, and one file for everything that is done.

``settings.json`` is written first. Each job's ``record.json`` appears whole, so a run that was killed at any moment
goes on after its last finished job. ``results.jsonl`` and the report are made of these files alone.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recurrent_drafter.records.provenance import write_json, write_records
from recurrent_drafter.reproduce.plan import CALIBRATION, Plan, ReproduceOptions, Source, plan_of

SETTINGS, RECORD, RESULTS = "settings.json", "record.json", "results.jsonl"
# Options that may change between two runs into one folder: they say which jobs there are, not what one of them yields.
FREE = ("methods", "scopes", "seeds", "output_dir", "quick", "dry_run", "launcher")

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    options: ReproduceOptions
    folder: Path
    plan: Plan

    @classmethod
    def of(cls, options: ReproduceOptions) -> "Results":
        return cls(options, Path(options.output_dir).expanduser(), plan_of(options))

    @classmethod
    def from_folder(cls, folder: Path) -> "Results":
        """As `claim` has written it."""
        options = json.loads((folder / SETTINGS).read_text())["options"]
        return cls.of(ReproduceOptions(**{**options, "output_dir": str(folder)}))

    def claim(self) -> None:
        """Make the folder this reproduction's. Raises ValueError where it holds results of other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settled = json.loads(json.dumps(asdict(self.options)))
        own = {name: value for name, value in settled.items() if name not in FREE}
        sets = {source: None for source in (*self.options.training_sets, *self.options.evaluation_sets)}
        own["files"] = {source.label: _hash(source) for source in sets if source.path}  # results depend on them, too
        path = self.folder / SETTINGS
        if path.exists():
            theirs = json.loads(path.read_text())["fixed"]
            differing = [name for name in own if theirs.get(name) != own[name]]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a reproduction with other settings ({', '.join(differing)}), and results are "
                    "not mixed: give another --output_dir, or remove this one"
                )
        write_json(path, {"fixed": own, "options": settled})

    @property
    def at_work(self) -> Path:
        """A file that names the job begun last: the one that is to blame when its process dies."""
        return self.folder / "at_work"

    def path(self, name: str) -> Path:
        return self.folder / "jobs" / name

    def record(self, name: str) -> Record | None:
        path = self.path(name) / RECORD
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, record: Record) -> None:
        """Keep a job's outcome, and the file of all outcomes with it."""
        self.path(name).mkdir(parents=True, exist_ok=True)
        write_json(self.path(name) / RECORD, {"name": name, **record})
        write_records(self.folder / RESULTS, self.records)

    def retry(self) -> None:
        """Forget failures, so that their jobs are pending again."""
        for name in self.plan.names:
            if self.failed(name):
                (self.path(name) / RECORD).unlink()

    def failed(self, name: str) -> bool:
        record = self.record(name)
        return record is not None and record["status"] == "failed"

    @property
    def steps(self) -> int:
        """How long each training is, by calibration. Raises ValueError where that has failed."""
        if not self.plan.calibrated:
            return 1
        record = self.record(CALIBRATION)
        if record is None or record["status"] == "failed":
            raise ValueError(f"how many steps to train is not known: {CALIBRATION} has failed")
        return int(record["max_steps"])

    @property
    def pending(self) -> list[str]:
        return [name for name in self.plan.names if self.record(name) is None]

    @property
    def records(self) -> list[Record]:
        """Outcomes, in the plan's order."""
        return [record for name in self.plan.names if (record := self.record(name)) is not None]


def failure(reason: str) -> Record:
    """The outcome of a job that has none."""
    return {"status": "failed", "error": reason}


def _hash(source: Source) -> str:
    """Of a file's bytes. Raises OSError, in one line, where it cannot be read."""
    try:
        with Path(str(source.path)).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise OSError(f"{source.path} cannot be read ({error.strerror}): expected a data file") from error
