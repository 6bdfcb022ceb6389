"""What a step costs on this machine, as steps tell; and the tuning that is kept beside a drafter."""

import dataclasses
import json
import logging
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel

from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.records.paths import TUNING_FILE, cache_folder
from recurrent_drafter.records.provenance import hardware, hash_of, write_json

logger = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

LEAST = 1e-6  # seconds, of what a clock cannot tell from nothing


@dataclass(frozen=True)
class Costs:
    """What the parts of a step take on one machine, in seconds: verifying by nodes, drafting by width and length.

    ``drafts`` has the seconds of W beams of L tokens, by (W, L). Empty: ``draft_level`` for each token, at any width.
    """

    rows: tuple[int, ...]  # how many nodes a pass verified, all rows of a batch together, ascending
    verify: tuple[float, ...]  # of a step for each of ``rows``, with everything but drafting
    draft_level: float  # of drafting for one more token of a draft's length
    drafts: Mapping[tuple[int, int], float] = field(default_factory=dict)
    batch: int = 1  # how many rows of a batch were measured

    def verifying(self, rows: npt.ArrayLike) -> Floats:
        """Seconds of verifying so many nodes: linear between the measured ones and beyond the last."""
        wanted, x, y = np.asarray(rows), np.asarray(self.rows, dtype=float), np.asarray(self.verify)
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else y[-1]
        return np.interp(wanted, x, y) + slope * np.maximum(wanted - x[-1], 0)

    def drafting(self, width: int, length: int) -> float:
        """Seconds of drafting W beams of L tokens. Raises KeyError for a pair that ``drafts`` lacks."""
        return self.drafts[width, length] if self.drafts else length * self.draft_level

    def step(self, shape: DraftShape | None) -> float:
        """Seconds of a step of ``batch`` rows at a shape; without one, of plain autoregression.

        >>> Costs(rows=(1, 3), verify=(4.0, 5.0), draft_level=0.5).step(DraftShape(1, 2))
        6.0
        """
        if shape is None:
            return float(self.verifying(self.batch))
        return float(self.verifying(self.batch * shape.nodes)) + self.drafting(shape.beam_width, shape.beam_length)

    def of_width(self, width: int) -> "Costs":
        """The same with drafts of this width alone: ``draft_level`` is what one more of their tokens takes."""
        seconds = {length: taken for (other, length), taken in self.drafts.items() if other == width}
        first, last = min(seconds), max(seconds)
        level = (seconds[last] - seconds[first]) / (last - first) if last > first else seconds[last] / last
        return dataclasses.replace(self, draft_level=max(level, LEAST), drafts={})


GUESS = Costs(rows=(1, 2, 4, 8, 16, 24, 32, 64), verify=(1.0, 1.1, 1.3, 1.45, 1.75, 2.1, 2.5, 4.0), draft_level=0.04)
KNOTS = np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024])
PLACES = KNOTS.tolist()
NEWEST, MACHINE = 0.05, 0.03  # weight of the newest step for nodes like its own, and for all
PATIENCE = 50  # steps without so many nodes
FEW = 1.0  # so many of these count then
FORGOTTEN = 0.003  # then, at every step, of what made them dear: so they are tried again
OUTLIER = 2.0  # a step that took more times what was expected, or less, counts as this
TRUSTED = 8.0  # steps that a curve of another day counts as


class LearnedCosts:
    """What verifying takes as the steps themselves show it: costs to begin with, corrected wherever steps tell.

    Corrections are factors at `KNOTS` of the rows verified, interpolated in between. ``start`` is a guess by default;
    what was measured is trusted more. The first step of all says how fast the machine is today.
    """

    def __init__(self, start: Costs | None = None) -> None:
        self.start = start or GUESS
        self.draft_level = self.start.draft_level
        self._corrections = np.zeros(len(KNOTS))  # logarithms
        self._seen = np.full(len(KNOTS), 0.0 if start is None else TRUSTED)
        self._since = np.zeros(len(KNOTS), dtype=int)  # steps since one of about so many nodes
        self.is_fresh = True  # no step has been seen

    def verifying(self, rows: npt.ArrayLike) -> Floats:
        """Expected seconds of verifying so many nodes, all rows of a batch together."""
        known = self._seen > 0
        corrections = self._corrections[known] if known.any() else self._corrections
        factors = np.interp(np.asarray(rows), KNOTS[known] if known.any() else KNOTS, corrections)
        return self.start.verifying(rows) * np.exp(factors)

    def took(self, rows: int, seconds: float) -> float:
        """A step verified so many nodes in so many seconds; returns how many times that is what was expected.

        It may tell of the machine, and all nodes, or of so many nodes: the more, the fewer such steps were seen.
        """
        surprise = ratio = seconds / float(self.verifying(rows))
        if self.is_fresh:
            self._corrections += math.log(ratio)
            self.draft_level *= ratio
            self.is_fresh, ratio = False, 1.0
        known, after = self._seen > 0, min(bisect_left(PLACES, rows), len(PLACES) - 1)
        low, high = max(after - 1, 0), after
        share = min((rows - PLACES[low]) / (PLACES[high] - PLACES[low]), 1.0) if high > low else 1.0
        near = [(knot, part) for knot, part in ((low, 1 - share), (high, share)) if part > 0]
        for knot, part in near:
            if not known[knot] and known.any():
                self._corrections[knot] = np.interp(PLACES[knot], KNOTS[known], self._corrections[known])
            self._seen[knot] += part
        weight = max(1 / max(sum(part * self._seen[knot] for knot, part in near), 1.0), NEWEST)
        change, whole = math.log(min(max(ratio, 1 / OUTLIER), OUTLIER)), sum(part**2 for _, part in near)
        self._since += 1
        self._corrections += (1 - weight) * MACHINE * change
        for knot, part in near:
            self._since[knot] = 0
            self._corrections[knot] += part / whole * weight * change
        dearest = max(self._corrections[knot] for knot, _ in near)
        forgotten = self._since > PATIENCE
        self._corrections[forgotten] -= FORGOTTEN * np.maximum(self._corrections[forgotten] - dearest, 0)
        self._seen[forgotten] = np.minimum(self._seen[forgotten], FEW)
        return surprise

    def save(self, path: Path) -> None:
        """Keep the curve where steps have shown it. Raises OSError where that cannot be written."""
        known = self._seen > 0
        seconds = np.maximum.accumulate(self.verifying(KNOTS))[known]
        path.parent.mkdir(parents=True, exist_ok=True)
        costs = {"rows": KNOTS[known].tolist(), "verify": seconds.tolist(), "draft_level": self.draft_level}
        write_json(path, costs)

    @classmethod
    def load(cls, path: Path | None) -> "LearnedCosts":
        """A curve of another day on the same machine, which new steps soon outweigh; a guess where none is kept.

        One that cannot be read is ignored (logged).
        """
        if path is None or not path.is_file():
            return cls()
        try:
            record = json.loads(path.read_text())
            rows, seconds = np.asarray(record["rows"]), np.asarray(record["verify"], dtype=float)
            level, known = float(record["draft_level"]), np.isin(KNOTS, rows)
            are_positive = np.isfinite(seconds).all() and min([*seconds, level]) > 0
            if rows.shape != seconds.shape or known.sum() != len(rows) or not are_positive:
                raise ValueError("expected positive seconds at known numbers of rows")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read and is ignored (%s: %s)", path, type(error).__name__, error)
            return cls()
        learned = cls()
        learned._seen[known], learned.draft_level = TRUSTED, level
        learned._corrections[known] = np.log(seconds / GUESS.verifying(KNOTS[known]))
        return learned


@dataclass(frozen=True)
class Tuning:
    """What was found, and what it holds for."""

    shape: DraftShape  # the fastest
    costs: Costs  # a single sequence's, with the shape's width
    holds_for: dict[str, Any]  # `conditions` under which it was measured

    def as_record(self) -> dict[str, Any]:
        """As `from_folder` reads it."""
        costs = {name: getattr(self.costs, name) for name in ("rows", "verify", "draft_level")}
        return {**self.holds_for, "shape": dataclasses.asdict(self.shape), "costs": costs}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tuning | None":
        """What lies beside a drafter in a local folder; None if nothing does, or nothing that can be read (logged)."""
        path = Path(folder).expanduser() / TUNING_FILE
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            costs: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in record["costs"].items()}
            holds_for = {name: record[name] for name in ("hardware", "dtype", "verifier")}
            return cls(DraftShape(**record["shape"]), Costs(**costs), holds_for)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read and is ignored (%s: %s)", path, type(error).__name__, error)
            return None

    def mismatch(self, model: PreTrainedModel) -> str | None:
        """Why it does not hold for this model as it lies here; None if it does."""
        here = conditions(model)
        for name, tuned in self.holds_for.items():
            if tuned != here[name]:
                return f"it is for the {name} {tuned}, and here it is {here[name]}"
        return None


def costs_file(model: PreTrainedModel, drafter: nn.Module | None) -> Path | None:
    """Where costs learned with this pair on this machine are kept; None where nothing can be."""
    if (folder := cache_folder()) is None:
        return None
    drafted = None if drafter is None else sum(parameter.numel() for parameter in drafter.parameters())
    return folder / "costs" / f"{hash_of({**conditions(model), 'drafter': drafted})}.json"


def conditions(model: PreTrainedModel) -> dict[str, Any]:
    """What measured costs depend on: hardware, dtype, and the verifier's architecture and size (not its weights)."""
    config = model.config.get_text_config()
    return {
        "hardware": hardware(model.device.type),
        "dtype": str(model.dtype).removeprefix("torch."),
        "verifier": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "attention": config._attn_implementation,
        },
    }
