"""What a step costs on this machine, measured; and the tuning that is kept beside a drafter."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from recurrent_drafter.core.accept import follow_tree
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree, root_tree
from recurrent_drafter.decoding.decode import Draft
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import TUNING_FILE
from recurrent_drafter.records.provenance import hardware

logger = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

MEASURED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
USUAL_LENGTH = 4  # of the draft that is timed
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


def measure_costs(
    verifier: Verifier,
    draft: Draft,
    context: int,
    *,
    batch: int = 1,
    rows: Sequence[int] = MEASURED_ROWS,
    widths: Sequence[int] = (1,),
    lengths: Sequence[int] = (USUAL_LENGTH,),
    repeats: int = 5,
) -> Costs:
    """Time real steps of B rows after ``context`` tokens each, and drafts; layers packed or not, as they are.

    Args:
        rows: how many nodes each row of the batch verifies, ascending from 1.
        widths: W of the drafts; `Costs.draft_level` is the first one's.
        lengths: L of the drafts. Levels are alike, so each width's times are put on a line over its lengths.
        repeats: rounds over everything; the least time of each counts.
    """
    text = torch.zeros(batch, max(context, 1), dtype=torch.int64, device=verifier.device)
    session, read = verifier.open(text, None, text.shape[1] + rows[-1])
    root, hidden = text[:, -1], read.hiddens[:, -1]
    sampler = Sampler(GenerationState(text, 1))

    def step(nodes: int) -> None:
        leaves = torch.zeros(batch, 1, nodes - 1, dtype=torch.int64, device=text.device)
        tree = prefix_tree(root, Beams(leaves, leaves, leaves.float()), nodes) if nodes > 1 else root_tree(root)
        follow_tree(tree, sampler.draws(tree, session.forward_tree(tree).logits)).n_accepted.tolist()

    def drafting(width: int, length: int) -> None:
        draft(hidden, root, width, length).log_probs.tolist()

    shapes = [(width, length) for width in widths for length in lengths]
    works = [*(partial(step, count) for count in rows), *(partial(drafting, *shape) for shape in shapes)]
    rounds = [[timeit(work, number=1) for work in works] for _ in range(repeats + 1)]  # the first warms up
    taken = np.min(rounds[1:], axis=0).tolist()  # what else runs on a machine only ever adds to it
    verify = isotonic_regression(taken[: len(rows)]).x  # more nodes never take less, noise or not
    drafts = dict(zip(shapes, on_lines(lengths, taken[len(rows) :]), strict=True))
    costs = Costs(tuple(batch * count for count in rows), tuple(verify.tolist()), LEAST, drafts, batch)
    return dataclasses.replace(costs, draft_level=costs.of_width(widths[0]).draft_level)


def on_lines(lengths: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Times of drafts of these lengths, for one width after another, smoothed: in each width all levels are alike."""
    smooth: list[float] = []
    for start in range(0, len(seconds), len(lengths)):
        line = np.polynomial.Polynomial.fit(lengths, seconds[start:][: len(lengths)], deg=min(1, len(lengths) - 1))
        smooth += [max(float(line(length)), LEAST) for length in lengths]
    return smooth


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
