"""From a reproduction's outcomes to comparisons: which trainings belong together, and how sure a difference is.

What varies is which prompts were held out and which seed a training had. Both are crossed: every training meets every
reply. So an interval is found by drawing replies with replacement, the same for all trainings, and seeds with
replacement, the same for both methods, over and over (the bootstrap of crossed data: Owen, "The pigeonhole bootstrap",
2007). A reply is the unit, not a step of it: steps along one reply are not independent of each other.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from recurrent_drafter.measure.ruler import CONFIDENCE, RESAMPLES, Estimate, Floats
from recurrent_drafter.reproduce.plan import Recipe
from recurrent_drafter.reproduce.results import Record


@dataclass(frozen=True)
class Walks:
    """Steps (seeds, replies) that trainings take along the same replies, and the tokens (replies) that these hold."""

    steps: Floats
    tokens: Floats

    @property
    def tokens_per_step(self) -> float:
        return float(len(self.steps) * self.tokens.sum() / self.steps.sum())

    @property
    def of_each_seed(self) -> list[float]:
        return [float(self.tokens.sum() / steps.sum()) for steps in self.steps]


def says(ratio: Estimate) -> str:
    """What a ratio with its interval says: ``more``, ``fewer`` or ``undecided``."""
    if ratio.low is None or ratio.high is None:
        return "undecided"
    return "more" if ratio.low > 1 else "fewer" if ratio.high < 1 else "undecided"


def tokens_per_step(walks: Walks) -> Estimate:
    """Of one method.

    >>> tokens_per_step(Walks(np.array([[2.0, 2.0, 2.0]]), np.array([4.0, 4.0, 4.0])))
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    return _estimate(walks.tokens_per_step, _resampled(walks))


def gain(walks: Walks, base: Walks) -> Estimate:
    """The ratio of tokens per step of two methods, paired by reply and by seed."""
    return _estimate(walks.tokens_per_step / base.tokens_per_step, _resampled(walks) / _resampled(base))


def _resampled(walks: Walks) -> Floats:  # (RESAMPLES,)
    """Tokens per step of samples drawn anew; the same draws for data of the same shape, which is what pairs two."""
    seeds, replies = walks.steps.shape
    generator = np.random.default_rng(0)
    of_reply = generator.multinomial(replies, np.full(replies, 1 / replies), RESAMPLES)
    of_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    steps = np.einsum("ns,sr,nr->n", of_seed, walks.steps, of_reply)
    return np.asarray(seeds * (of_reply @ walks.tokens) / steps)


def _estimate(value: float, resampled: Floats) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class Place:
    """Where a drafter is evaluated: a set, and a shape of draft."""

    set: str
    beam_width: int
    beam_length: int

    @property
    def beams(self) -> str:
        return f"{self.beam_width} x {self.beam_length}"

    def __str__(self) -> str:
        return f"{self.set}, {self.beams}"


@dataclass(frozen=True)
class Gain:
    """Tokens per step of an arm at a place, over those of an arm that differs in one thing."""

    arm: Recipe
    place: Place
    ratio: Estimate

    @property
    def verdict(self) -> str:
        return says(self.ratio)


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
    def evaluations(self) -> list[Record]:
        return [entry for records in self.trainings.values() for record in records for entry in record["evaluations"]]

    @property
    def places(self) -> list[Place]:
        found = (Place(entry["set"], entry["beam_width"], entry["beam_length"]) for entry in self.evaluations)
        return list(dict.fromkeys(found))

    @property
    def distilling_seconds(self) -> float:
        """Of all trainings together."""
        records = [record for arm, records in self.trainings.items() if arm.method == "distilled" for record in records]
        return float(sum(record["targets_seconds"] for record in records))

    def sweep(self, kind: str) -> Record | None:
        return next((record for record in self.records if record.get("kind") == kind), None)

    def replies(self, set_name: str) -> list[int]:
        """The tokens, after its first, of each reply of a set that is walked along."""
        return next((entry["tokens"] for entry in self.evaluations if entry["set"] == set_name), [])

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
        own, other = ({record["seed"] for record in self.trainings.get(which, ())} for which in (arm, base))
        if not (common := sorted(own & other)):
            return None
        return gain(self.walks(arm, place, common), self.walks(base, place, common))

    def gains(self, **changed: Any) -> list[Gain]:
        """Every arm over the one that is as it but for this, at every place, where both were trained."""
        found = []
        for arm in self.trainings:
            base = replace(arm, **changed)
            for place in self.places:
                ratio = self.gain(arm, base, place) if arm != base else None
                if ratio is not None:
                    found.append(Gain(arm, place, ratio))
        return found
