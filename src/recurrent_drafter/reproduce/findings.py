"""From a reproduction's outcomes to comparisons: which trainings belong together, and along what they were walked."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.reproduce.results import Record
from recurrent_drafter.reproduce.statistics import Walks, gain, tokens_per_step


@dataclass(frozen=True)
class Recipe:
    """Trainings that differ in their seed alone."""

    training_set: str
    scope: str
    method: str
    rnn: bool


@dataclass(frozen=True)
class Place:
    """Where a drafter is evaluated: a set, and a shape of draft."""

    set: str
    beam_width: int
    beam_length: int


@dataclass(frozen=True)
class Findings:
    records: list[Record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "failed"]

    @cached_property
    def trainings(self) -> dict[Recipe, list[Record]]:
        """The finished ones, by arm, in the plan's order; those without recurrence come last."""
        arms: dict[Recipe, list[Record]] = {}
        for record in self.records:
            if record.get("kind") == "training":
                arm = Recipe(*(record[name] for name in ("training_set", "scope", "method", "rnn")))
                arms.setdefault(arm, []).append(record)
        return dict(sorted(arms.items(), key=lambda item: not item[0].rnn))

    @property
    def places(self) -> list[Place]:
        found = [
            Place(entry["set"], entry["beam_width"], entry["beam_length"])
            for records in self.trainings.values()
            for record in records
            for entry in record["evaluations"]
        ]
        return list(dict.fromkeys(found))

    def sweep(self, kind: str) -> Record | None:
        return next((record for record in self.records if record.get("kind") == kind), None)

    def replies(self, set_name: str) -> tuple[int, int]:
        """How many replies of a set are walked along, and the tokens in them after each one's first."""
        entries = (e for records in self.trainings.values() for record in records for e in record["evaluations"])
        entry = next(entry for entry in entries if entry["set"] == set_name)
        return len(entry["tokens"]), sum(entry["tokens"])

    def walks(self, arm: Recipe, place: Place, seeds: list[int] | None = None) -> Walks:
        """Of an arm's trainings (those of the ``seeds``, if given) along a set's replies."""
        entries = [
            entry
            for record in sorted(self.trainings[arm], key=lambda record: int(record["seed"]))
            for entry in record["evaluations"]
            if (entry["set"], entry["beam_width"]) == (place.set, place.beam_width)
            and (seeds is None or record["seed"] in seeds)
        ]
        return Walks(np.array([entry["steps"] for entry in entries], float), np.array(entries[0]["tokens"], float))

    def estimate(self, arm: Recipe, place: Place) -> Estimate:
        return tokens_per_step(self.walks(arm, place))

    def gain(self, arm: Recipe, base: Recipe, place: Place) -> Estimate | None:
        """An arm's tokens per step over another's, by the seeds that both have finished; None without any."""
        if arm not in self.trainings or base not in self.trainings:
            return None
        own, other = ({int(record["seed"]) for record in self.trainings[which]} for which in (arm, base))
        if not (common := sorted(own & other)):
            return None
        return gain(self.walks(arm, place, common), self.walks(base, place, common))
