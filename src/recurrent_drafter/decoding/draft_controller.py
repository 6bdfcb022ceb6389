"""How much to draft and verify, from what it costs here and what has been accepted so far.

A step of n nodes takes t(n) and yields one token plus the draft tokens accepted. Verifying the n - 1 most probable
nodes is expected to yield 1 + p_1 + ... + p_(n-1) tokens, so the budget is the n with the best ratio of the two, over
all n: t is not convex, and a marginal rule would stop at a local optimum. A draft grows level by level while one more
is expected to yield tokens faster than decoding does on average. Steps are plain autoregression where that is the
faster way, until a cheap probe says otherwise.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import DraftTree
from recurrent_drafter.decoding.costs import Costs, Floats, isotonic
from recurrent_drafter.decoding.generation_state import Step
from recurrent_drafter.models.config import DraftShape

LONGEST = 10  # tokens to draft at most, where each of them has to pay
PROBE_COST = 0.02  # at most this share of plain steps' time goes into probes
UNEVEN = 0.15  # rows advance unevenly, and a batch takes so much longer for each doubling than its mean row
TRIALS = 4  # speculative steps before judging, every other step
COMPARE = 64  # every so many speculative steps take a plain step, so that its time is known as well
MEMORY = 0.05  # weight of the newest observation once there are many
COMPARISON = 0.25  # and of one that tells plain and speculative steps apart


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


@dataclass
class Experience:
    """What steps with about so many rows are like: running averages.

    ``plain``, ``tree`` and ``drafting``: how many times as long as expected plain steps, verifying trees and drafting
    take. ``tokens`` (per row), ``levels`` and ``nodes`` (per row) are those of drafted steps, ``seen`` their number.
    """

    plain: float = 1.0
    tree: float = 1.0
    drafting: float = 1.0
    tokens: float = 2.0
    levels: float = 2.0
    nodes: float = 3.0
    seen: int = 0
    was_plain: bool = True  # the newest step

    def verified(self, ratio: float, *, is_plain: bool) -> None:
        """A step of either kind took so many times what was expected.

        Behind one of the same kind that tells of the machine, and both are corrected. Behind one of the other kind it
        is a comparison: the machine is the same, so only this kind is.
        """
        before = self.plain if is_plain else self.tree
        if is_plain == self.was_plain:
            change = _nearer(before, ratio, MEMORY) / before
            self.plain *= change
            self.tree *= change
        elif is_plain:
            self.plain = _nearer(before, ratio, COMPARISON)
        else:
            self.tree = _nearer(before, ratio, COMPARISON)
        self.was_plain = is_plain

    def drafted(self, ratio: float) -> None:
        """A draft took so many times what was expected."""
        self.drafting = _nearer(self.drafting, ratio, MEMORY)

    def accepted(self, tokens: float, levels: int, nodes: int) -> None:
        """What a drafted step came to."""
        self.seen += 1
        weight = max(1 / (self.seen + 1), MEMORY)
        self.tokens += weight * (tokens - self.tokens)
        self.levels += weight * (levels - self.levels)
        self.nodes += weight * (nodes - self.nodes)


def _nearer(average: float, new: float, weight: float) -> float:
    """A running average with its newest value, which counts as no more than twice or half of it."""
    return average + weight * (min(max(new, average / 2), average * 2) - average)


class AutoPace:
    """Speculates as far as it pays. One for each verifier, drafter and way of sampling; it goes on learning.

    Args:
        costs: of this machine.
        shape: beam width, and the most tokens to draft; its nodes, if set, are the most to verify.
    """

    def __init__(self, costs: Costs, shape: DraftShape) -> None:
        self.costs, self.shape = costs, shape
        self.calibration = Calibration()
        self._tables: dict[int, Floats] = {}  # batch: [n - 1] is the expected time of verifying n nodes per row
        self._experiences: dict[int, Experience] = {}  # by the batch's magnitude in powers of two
        self._lately = Experience()
        self._plain_steps = self._draft_steps = 0
        self._batch = self._limit = self._level = 0
        self._reached = 1.0  # how often the newest level is expected to be accepted
        self._rate = 0.0  # tokens per second and row
        self._began = 0.0

    def plan(self, batch: int, longest: int) -> tuple[int, int]:
        """As far as `deeper` will go; or length 0, where plain autoregression is the faster."""
        self._began, self._batch = time.perf_counter(), batch
        self._level, self._reached = 0, 1.0
        if batch not in self._tables:
            nodes = np.arange(1, 2 + self.shape.beam_width * self.shape.beam_length)
            self._tables[batch] = self.costs.verifying(batch * nodes)
        magnitude = batch.bit_length()  # rows leave one by one: what 15 have shown holds for 14
        if magnitude not in self._experiences:
            self._experiences[magnitude] = replace(self._lately, seen=0)
        self._lately = self._experiences[magnitude]
        self._limit = min(longest, self.shape.beam_length)
        return self.shape.beam_width, self._limit if self._limit > 0 and self._speculates() else 0

    def _speculates(self) -> bool:
        lately = self._lately
        plain = lately.plain * self._verifying(1)
        drafted = lately.tree * self._verifying(lately.nodes) + lately.levels * self._draft_level
        self._rate = max(lately.tokens / drafted, 1 / plain)
        drafted *= 1 + UNEVEN * math.log2(self._batch)
        if lately.seen < TRIALS:
            return lately.was_plain
        if lately.tokens * plain >= drafted:
            self._draft_steps, self._plain_steps = self._draft_steps + 1, 0
            return self._draft_steps % COMPARE != 0
        self._plain_steps += 1
        if self._plain_steps * PROBE_COST * plain < drafted - plain:
            return False
        self._plain_steps = 0
        return True

    @property
    def _draft_level(self) -> float:
        """Seconds of drafting one level."""
        return self._lately.drafting * self.costs.draft_level

    def _verifying(self, nodes: float) -> float:
        """Expected seconds of verifying so many nodes per row, a broken number of them included."""
        table = self._tables[self._batch]
        low = min(int(nodes), len(table) - 1)
        return float(table[low - 1] + (nodes - low) * (table[low] - table[low - 1])) if low else float(table[0])

    def deeper(self, log_probs: Tensor) -> bool:  # (B, W)
        """Whether one more level is expected to yield more than decoding does on average in the time that it takes.

        Where looking at the beams would mean waiting for an accelerator: whether lately about as many were accepted.
        """
        self._level += 1
        if log_probs.device.type != "cpu":
            return self._level < self._lately.tokens
        before, self._reached = self._reached, float(self.calibration(log_probs.numpy()).sum(1).mean())
        gain = self._reached * min(self._reached / max(before, 1e-9), 1.0)  # the next level falls off as this one did
        breadth = (self._lately.nodes - 1) / self._lately.levels
        first = 1 + self._level * breadth
        more = self._verifying(first + breadth) - self._verifying(first)
        return gain > self._rate * (self._draft_level + self._lately.tree * more)

    def budget(self, beams: Beams) -> int:
        """The number of nodes with the best expected rate, at least one draft token."""
        _, length, width = beams.tokens.shape
        log_probs = beams.log_probs.flatten(1).cpu().numpy()  # (B, L W); the draft is there by now
        drafting = time.perf_counter() - self._began
        self._lately.drafted(drafting / (length * self.costs.draft_level))
        gains = np.sort(self.calibration(log_probs), axis=1)[:, ::-1].mean(0)
        most = length * width if self.shape.max_tree_nodes is None else self.shape.max_tree_nodes - 1
        seconds = drafting + self._lately.tree * self._tables[self._batch][1 : most + 1]
        self._began += drafting
        return int(np.argmax((1 + np.cumsum(gains[:most])) / seconds[: len(gains)])) + 2

    def observe(self, tree: DraftTree, step: Step) -> None:
        """Learn the step's cost and what was accepted."""
        batch, nodes = tree.tokens.shape
        levels = tree.max_depth
        ratio = (time.perf_counter() - self._began) / float(self._tables[batch][nodes - 1])
        self._lately.verified(ratio, is_plain=levels == 0)
        if levels == 0:
            return
        if levels < self._limit or self._limit == self.shape.beam_length:  # not cut short by the reply's end
            self._lately.accepted(sum(step.n_accepted) / batch + 1, levels, nodes)
        accepted = np.zeros((batch, nodes), dtype=bool)
        np.put_along_axis(accepted, np.asarray(step.path), values=True, axis=1)
        self.calibration.update(tree.log_probs[:, 1:].cpu().numpy(), accepted[:, 1:])
