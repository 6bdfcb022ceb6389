"""How much to draft and verify, from what it costs here and what has been accepted so far (layer 3).

A step of n nodes takes t(n) and yields one token plus the draft tokens accepted. Verifying the n - 1 most probable
nodes is expected to yield 1 + p_1 + ... + p_(n-1) tokens, so the budget is the n with the best ratio of the two, over
all n: t is not convex, and a marginal rule would stop at a local optimum. Before drafting the same ratio is asked of
every draft length, 0 included. At 0 steps are plain autoregression, until a cheap probe says otherwise.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from recurrent_drafter.accept import follow_tree
from recurrent_drafter.beam import Beams
from recurrent_drafter.config import DraftShape
from recurrent_drafter.decode import Draft
from recurrent_drafter.sampler import Sampler
from recurrent_drafter.stop import Step, Stop
from recurrent_drafter.tree import DraftTree, prefix_tree, root_tree
from recurrent_drafter.verifier import Verifier

Floats = npt.NDArray[np.float64]

MEASURED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
PROBE_COST = 0.02  # at most this share of plain steps' time goes into probes
PROBE_LENGTH = 2
LOOK_FURTHER = 16  # every so many speculative steps draft as far as allowed
COMPARE = 64  # and every so many take a plain step, so that its time is known as well
MEMORY = 0.05  # weight of the newest observation once there are many


@dataclass(frozen=True)
class Costs:
    """What was measured on this machine, in seconds.

    Args:
        rows: how many nodes a pass verified, all rows of a batch together, ascending from 1.
        verify: a step's time for each, with everything but drafting.
        draft_level: drafting one token deeper.
    """

    rows: tuple[int, ...]
    verify: tuple[float, ...]
    draft_level: float

    def __call__(self, rows: npt.NDArray[np.int64]) -> Floats:
        """Seconds of verifying so many nodes: linear between the measured ones and beyond the last."""
        x, y = np.asarray(self.rows, dtype=float), np.asarray(self.verify)
        inside = np.interp(rows, x, y)
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 else y[-1]
        return np.where(rows > x[-1], y[-1] + slope * (rows - x[-1]), inside)


class Calibration:
    """How often a node is accepted that the drafter gives a cumulative log-probability to.

    Monotone (isotonic regression), so a child is never more probable than its parent. Begins at the drafter's own word.
    """

    EDGES = np.array([-8.0, -6.0, -4.5, -3.5, -2.7, -2.0, -1.5, -1.1, -0.8, -0.55, -0.35, -0.2, -0.1, -0.03])
    PRIOR = 4.0  # observations that the drafter's own word counts for
    KEPT = 2000.0  # observations of a bin beyond which the older half fades

    def __init__(self) -> None:
        middles = np.exp(np.concatenate([[-9.0], (self.EDGES[:-1] + self.EDGES[1:]) / 2, [-0.015]]))
        self.seen = np.full(len(middles), self.PRIOR)
        self.accepted = self.PRIOR * middles
        self._share: Floats | None = None

    def __call__(self, log_probs: Floats) -> Floats:
        """Probabilities of acceptance."""
        if self._share is None:
            self._share = isotonic(self.accepted, self.seen)
        return self._share[np.digitize(log_probs, self.EDGES)]

    def update(self, log_probs: Floats, accepted: npt.NDArray[np.bool_]) -> None:
        """Learn from verified nodes."""
        bins = np.digitize(log_probs.ravel(), self.EDGES)
        self.seen += np.bincount(bins, minlength=len(self.seen))
        self.accepted += np.bincount(bins, weights=accepted.ravel(), minlength=len(self.seen))
        fading = np.where(self.seen > self.KEPT, 0.5, 1.0)
        self.seen *= fading
        self.accepted *= fading
        self._share = None


def isotonic(hits: Floats, trials: Floats) -> Floats:
    """Rates hits / trials that never fall, by pooling neighbours that do (least squares, weighted by trials).

    >>> isotonic(np.array([1.0, 6.0, 3.0]), np.array([10.0, 10.0, 10.0])).tolist()
    [0.1, 0.45, 0.45]
    """
    pools: list[tuple[float, float, int]] = []
    for pool in zip(hits, trials, [1] * len(hits), strict=True):
        while pools and pools[-1][0] / pools[-1][1] >= pool[0] / pool[1]:
            pool = tuple(a + b for a, b in zip(pools.pop(), pool, strict=True))
        pools.append(pool)
    return np.repeat([hit / trial for hit, trial, _ in pools], [count for *_, count in pools])


class AutoPace:
    """Speculates as far as it pays. One for each verifier, drafter and way of sampling; it goes on learning.

    Args:
        costs: of this machine.
        shape: beam width, and the most tokens to draft; its nodes, if set, are the most to verify.
    """

    def __init__(self, costs: Costs, shape: DraftShape) -> None:
        self.costs, self.shape = costs, shape
        self.calibration = Calibration()
        self._reach = 0.7 ** np.arange(1, shape.beam_length + 1)  # [d - 1]: how often d draft tokens are accepted
        self._reach_seen = np.zeros(shape.beam_length)
        self._nodes_per_level = float(shape.beam_width)
        self._drifts: dict[int, list[float]] = {}  # batch: measured over expected seconds of plain and drafted steps
        self._tables: dict[int, Floats] = {}  # batch: [n - 1] is the expected time of verifying n nodes per row
        self._plain_steps = self._draft_steps = 0
        self._batch = self._length = 0
        self._began = 0.0

    def plan(self, batch: int, longest: int) -> tuple[int, int]:
        """The draft length with the best expected rate; 0 when plain autoregression has it."""
        self._began, self._batch = time.perf_counter(), batch
        if batch not in self._tables:
            nodes = np.arange(1, 2 + self.shape.beam_width * self.shape.beam_length)
            self._tables[batch], self._drifts[batch] = self.costs(batch * nodes), [1.0, 1.0]
        self._length = self._choose(min(longest, self.shape.beam_length))
        return self.shape.beam_width, self._length

    def _choose(self, limit: int) -> int:
        if limit < 1:
            return 0
        table, (plain, drafted) = self._tables[self._batch], self._drifts[self._batch]
        lengths = np.arange(limit + 1)
        drafts = np.ceil(self._nodes_per_level * lengths).astype(np.int64)  # nodes without the root
        seconds = drafted * (table[drafts] + lengths * self.costs.draft_level)
        seconds[0] = plain * table[0]
        tokens = np.ones(limit + 1)
        tokens[1:] += np.cumsum(self._reach[:limit])
        best = int(np.argmax(tokens / seconds))
        if best == 0:
            self._plain_steps += 1
            probe = min(PROBE_LENGTH, limit)
            if self._plain_steps * PROBE_COST * seconds[0] < seconds[probe] - seconds[0]:
                return 0
            best = probe
        else:
            self._draft_steps += 1
            if self._draft_steps % COMPARE == 0:
                return 0
            if self._draft_steps % LOOK_FURTHER == 0:
                best = limit
        self._plain_steps = 0
        return best

    def budget(self, beams: Beams) -> int:
        """The number of nodes with the best expected rate, at least one draft token."""
        _, length, width = beams.tokens.shape
        log_probs = beams.log_probs.flatten(1).double().cpu().numpy()  # (B, L W)
        gains = -np.sort(-self.calibration(log_probs), axis=1).mean(0)
        most = length * width if self.shape.max_tree_nodes is None else self.shape.max_tree_nodes - 1
        seconds = self._tables[self._batch][1 : most + 1] + length * self.costs.draft_level
        return int(np.argmax((1 + np.cumsum(gains[:most])) / seconds[: len(gains)])) + 2

    def observe(self, tree: DraftTree, step: Step) -> None:
        """Learn the step's cost and what was accepted."""
        batch, nodes = tree.tokens.shape
        expected = float(self._tables[batch][nodes - 1]) + self._length * self.costs.draft_level
        self._time_step((time.perf_counter() - self._began) / expected)
        if self._length == 0:
            return
        depths = np.arange(1, self._length + 1)
        reached = (np.asarray(step.n_accepted)[:, None] >= depths).mean(0)
        self._reach_seen[: self._length] += 1
        weight = np.maximum(1 / (self._reach_seen[: self._length] + 1), MEMORY)
        self._reach[: self._length] += weight * (reached - self._reach[: self._length])
        self._nodes_per_level += weight[0] * ((nodes - 1) / self._length - self._nodes_per_level)
        accepted = np.zeros((batch, nodes), dtype=bool)
        np.put_along_axis(accepted, np.asarray(step.path), values=True, axis=1)
        self.calibration.update(tree.log_probs[:, 1:].double().cpu().numpy(), accepted[:, 1:])

    def _time_step(self, ratio: float) -> None:
        """Learn how much longer this kind of step takes than expected; what changes is the machine, so for both."""
        drifts, kind = self._drifts[self._batch], int(self._length > 0)
        before = drifts[kind]
        after = before + MEMORY * (min(max(ratio, before / 2), before * 2) - before)
        drifts[1 - kind] *= after / before
        drifts[kind] = after


def measure_costs(
    verifier: Verifier,
    draft: Draft,
    width: int,
    context: int,
    *,
    batch: int = 1,
    most_rows: int = 64,
    repeats: int = 5,
) -> Costs:
    """Time real steps behind texts of ``context`` tokens, up to ``most_rows`` nodes each: medians of ``repeats``."""
    device = verifier.device
    text = torch.zeros(batch, max(context, 1), dtype=torch.int64, device=device)
    session, read = verifier.open(text, None, text.shape[1] + most_rows)
    root, hidden = text[:, -1], read.hiddens[:, -1]
    sampler = Sampler(Stop(text, 1))

    def step(rows: int) -> None:
        leaves = torch.zeros(batch, 1, rows - 1, dtype=torch.int64, device=device)
        tree = prefix_tree(root, Beams(leaves, leaves, leaves.float()), rows) if rows > 1 else root_tree(root)
        follow_tree(tree, sampler.draws(tree, session.forward_tree(tree).logits)).n_accepted.tolist()

    def drafting(levels: int) -> None:
        draft(hidden, root, width, levels).log_probs.tolist()

    rows = [count for count in MEASURED_ROWS if count <= most_rows]
    verify = [median_seconds(partial(step, count), repeats) for count in rows]
    deeper = median_seconds(partial(drafting, 4), repeats) - median_seconds(partial(drafting, 2), repeats)
    return Costs(tuple(batch * count for count in rows), tuple(verify), max(deeper / 2, 1e-6))


def median_seconds(work: Callable[[], None], repeats: int) -> float:
    """The median time of ``repeats`` calls, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))
