"""How much to draft and verify, from what it costs here and what has been accepted so far.

A step takes a time and yields one token plus the draft tokens accepted. What decides is the rate of the two, by one
estimator for both engines: seconds by load and draft length (`LengthChoice`), acceptance in counts that fade
(`AcceptanceCounts`). Lengths that were slower are tried again for at most 2 % of the time.

Here (`TreeController`) a step is plain autoregression or a tree. Verifying the n - 1 most probable nodes is expected to
yield 1 + p_1 + ... + p_(n-1) tokens, so the budget is the n with the best rate, over all n: t is not convex, and a
marginal rule would stop at a local optimum. A draft grows level by level while one more is expected to yield tokens
faster than decoding does on average. In vLLM (`ChainController`) a step verifies one chain of a few possible lengths.

Decisions change the speed, never a token. Under a fixed clock (of seconds) they are a function of what was observed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recurrent_drafter.core.beam import Beams
from recurrent_drafter.decoding.costs import Costs, Floats
from recurrent_drafter.decoding.generation_state import Step
from recurrent_drafter.decoding.rates import MEMORY, AcceptanceByClaim, AcceptanceByDepth, LengthChoice, nearer
from recurrent_drafter.models.config import DraftShape

LONGEST = 10  # tokens to draft at most, where each of them has to pay
UNEVEN = 0.15  # rows advance unevenly, and a batch takes so much longer for each doubling than its mean row
# What a chain has to gain for each doubling of the rows: it slows down steps that read prompts too, which are not
# timed, and drafts go beyond the end of a reply.
CROWDED = 0.06


class ChainController:
    """Chooses the length of the chains of one step: all of ``length``, half of it, or none."""

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._lengths = sorted({length, (length + 1) // 2, 0}, reverse=True)
        self._acceptance = AcceptanceByDepth(length)
        self._clock = clock
        self._loads: dict[int, LengthChoice] = {}  # by the rows' magnitude in powers of two
        self._before: tuple[float, int, int] | None = None  # when the last step was planned, its rows and its length

    def plan(self, drafted: Sequence[int], emitted: Sequence[int], *, alone: bool) -> int:
        """The length for the next step.

        Args:
            drafted: how many draft tokens each row had verified in the step that has just ended.
            emitted: how many tokens it got, at least one each.
            alone: whether that step did nothing besides, such as reading prompts.
        """
        now, rows = self._clock(), len(emitted)
        self._acceptance.verified(drafted, [tokens - 1 for tokens in emitted])
        load = self._loads.setdefault(rows.bit_length(), LengthChoice(self._lengths))
        if self._before is not None and alone and self._before[1] == rows:
            load.took(self._before[2], now - self._before[0])
        expected = self._acceptance.tokens
        tokens = {length: expected[length] for length in self._lengths}
        tokens[0] = 1 + CROWDED * math.log2(rows)
        seconds = {length: taken or 1.0 for length, taken in load.slowness.items()}
        self._before = now, rows, load.choose(tokens, seconds)
        return self._before[2]


@dataclass
class TreeLoad:
    """What drafted steps with about so many rows are like: running averages.

    ``drafting``: how many times as long as expected drafts take. ``tokens`` and ``nodes`` are those of a row,
    ``levels`` the depth of its draft. ``gains`` (most nodes - 1,) are the nodes' probabilities, the best first.
    """

    choice: LengthChoice
    gains: Floats
    drafting: float = 1.0
    tokens: float = 2.0
    levels: float = 2.0
    nodes: float = 3.0
    seen: int = 0

    def afresh(self) -> "TreeLoad":
        """What is known of the machine and of drafts, for another load."""
        return replace(self, choice=self.choice.afresh(), gains=self.gains.copy(), seen=0)

    def drafted(self, tokens: float, levels: int, nodes: int) -> None:
        """What one more of them came to."""
        self.seen += 1
        weight = max(1 / (self.seen + 1), MEMORY)
        self.tokens += weight * (tokens - self.tokens)
        self.levels += weight * (levels - self.levels)
        self.nodes += weight * (nodes - self.nodes)

    def verified(self, gains: Floats) -> None:
        """Learn the gains of those verified; others' drift up to the last one's, so that more are tried again."""
        count = len(gains)
        self.gains[:count] += MEMORY * (gains - self.gains[:count])
        self.gains[count:] += MEMORY * (gains[-1] - self.gains[count:])


class TreeController:
    """Speculates as far as it pays. One for each verifier, drafter and way of sampling; it goes on learning.

    Where looking at a draft would mean waiting for an accelerator, averages over the last drafts stand in for it. The
    shape has the beam width and the most tokens to draft; its nodes, if set, are the most to verify.
    """

    def __init__(self, costs: Costs, shape: DraftShape, clock: Callable[[], float] = time.perf_counter) -> None:
        self.costs, self.shape = costs, shape
        self._clock = clock
        self._acceptance = AcceptanceByClaim()
        self._tables: dict[int, Floats] = {}  # batch: [n - 1] is the expected time of verifying n nodes per row
        self._loads: dict[int, TreeLoad] = {}  # by the batch's magnitude in powers of two
        self._load = TreeLoad(LengthChoice((shape.beam_length, 0), slowness=1.0), np.ones(shape.nodes - 1))
        self._batch = self._limit = self._level = 0
        self._reached = 1.0  # how often the newest level is expected to be accepted
        self._rate = 0.0  # tokens per second and row
        self._began = self._untimed = 0.0  # when this part of the step did; what is expected of a draft within it

    def plan(self, batch: int, longest: int) -> tuple[int, int]:
        """As far as `deeper` will go; or length 0, where plain autoregression is the faster."""
        self._began, self._untimed, self._batch = self._clock(), 0.0, batch
        self._level, self._reached = 0, 1.0
        if batch not in self._tables:
            nodes = np.arange(1, 2 + self.shape.beam_width * self.shape.beam_length)
            self._tables[batch] = self.costs.verifying(batch * nodes)
        magnitude = batch.bit_length()  # rows leave one by one: what 15 have shown holds for 14
        if magnitude not in self._loads:
            self._loads[magnitude] = self._load.afresh()
        self._load = self._loads[magnitude]
        self._limit = min(longest, self.shape.beam_length)
        return self.shape.beam_width, self._limit if self._limit > 0 and self._speculates() else 0

    def _speculates(self) -> bool:
        load, drafts = self._load, self.shape.beam_length
        seconds = {
            drafts: self._tree * self._verifying(load.nodes) + load.levels * self._draft_level,
            0: load.choice.slowness[0] * self._verifying(1),
        }
        self._rate = max(load.tokens / seconds[drafts], 1 / seconds[0])
        return load.choice.choose({drafts: load.tokens, 0: 1 + UNEVEN * math.log2(self._batch)}, seconds) > 0

    @property
    def _tree(self) -> float:
        """How many times as long as expected verifying a tree takes."""
        return self._load.choice.slowness[self.shape.beam_length]

    @property
    def _draft_level(self) -> float:
        """Seconds of drafting one level."""
        return self._load.drafting * self.costs.draft_level

    def _verifying(self, nodes: float) -> float:
        """Expected seconds of verifying so many nodes per row, which may be a fraction."""
        table = self._tables[self._batch]
        low = min(int(nodes), len(table) - 1)
        return float(table[low - 1] + (nodes - low) * (table[low] - table[low - 1])) if low else float(table[0])

    def deeper(self, log_probs: Tensor) -> bool:  # (B, W)
        """Whether one more level is expected to yield more than decoding does on average in the time that it takes.

        On an accelerator: whether lately about as many were accepted.
        """
        self._level += 1
        if log_probs.device.type != "cpu":
            return self._level < self._load.tokens
        before, self._reached = self._reached, float(self._acceptance(log_probs.numpy()).sum(1).mean())
        gain = self._reached * min(self._reached / max(before, 1e-9), 1.0)  # the next level falls off as this one did
        breadth = (self._load.nodes - 1) / self._load.levels
        first = 1 + self._level * breadth
        more = self._verifying(first + breadth) - self._verifying(first)
        return gain > self._rate * (self._draft_level + self._tree * more)

    def budget(self, beams: Beams) -> int:
        """The number of nodes with the best expected rate, at least one draft token."""
        _, length, width = beams.tokens.shape
        if beams.log_probs.device.type == "cpu":
            drafting = self._clock() - self._began
            self._began += drafting
            self._load.drafting = nearer(self._load.drafting, drafting / (length * self.costs.draft_level), MEMORY)
            gains = self._gains(beams.log_probs.flatten(1).numpy())
        else:
            self._untimed = length * self.costs.draft_level
            drafting, gains = self._load.drafting * self._untimed, self._load.gains[: length * width]
        most = length * width if self.shape.max_tree_nodes is None else self.shape.max_tree_nodes - 1
        seconds = drafting + self._tree * self._tables[self._batch][1 : most + 1]
        return int(np.argmax((1 + np.cumsum(gains[:most])) / seconds[: len(gains)])) + 2

    def _gains(self, log_probs: npt.NDArray[Any]) -> Floats:  # (B, n) -> (n,)
        """What each further node is expected to yield for a row, the best nodes first."""
        return np.sort(self._acceptance(log_probs), axis=1)[:, ::-1].mean(0)

    def observe(self, step: Step) -> None:
        """Learn the step's cost and what was accepted."""
        batch, nodes = step.log_probs.shape
        load, levels = self._load, step.drafted
        expected = self._untimed + float(self._tables[batch][nodes - 1])
        load.choice.took(self.shape.beam_length if levels else 0, (self._clock() - self._began) / expected)
        if levels == 0:
            return
        if levels < self._limit or self._limit == self.shape.beam_length:  # not cut short by the reply's end
            load.drafted(sum(step.n_accepted) / batch + 1, levels, nodes)
        accepted = np.zeros((batch, nodes), dtype=bool)
        np.put_along_axis(accepted, np.asarray(step.path), values=True, axis=1)
        self._acceptance.verified(step.log_probs[:, 1:], accepted[:, 1:])
        if self._untimed:
            load.drafting = self._tree
            load.verified(self._gains(step.log_probs[:, 1:]))
