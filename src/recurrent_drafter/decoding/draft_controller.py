"""How much to draft and verify, from what it costs here and what has been accepted so far.

A step takes a time and yields one token plus the draft tokens accepted. What decides is the rate of the two, by one
estimator for both engines: seconds by load and draft length (`LengthChoice`), acceptance in counts that fade
(`AcceptanceCounts`). Lengths that were slower are tried again for at most 2 % of the time.

Here (`TreeController`) a step verifies a tree of n nodes, or the root alone. Verifying the n - 1 most probable nodes is
expected to yield 1 + p_1 + ... + p_(n-1) tokens, so the budget is the n with the best rate, over all n: t is not
convex, and a marginal rule would stop at a local optimum. What lookup found is there before the drafter runs, which it
does where that is expected to yield more. A draft grows level by level while one more is expected to yield tokens
faster than decoding does on average. What steps cost is learned from the steps. In vLLM (`ChainController`) a step
verifies one chain of a few possible lengths.

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

from recurrent_drafter.core.tree import DRAFTER
from recurrent_drafter.decoding.costs import Costs, Floats, LearnedCosts
from recurrent_drafter.decoding.generation_state import Step
from recurrent_drafter.decoding.lookup import Found
from recurrent_drafter.decoding.rates import (
    COMPARE,
    MEMORY,
    PROBE_COST,
    AcceptanceByClaim,
    AcceptanceByDepth,
    LengthChoice,
    logarithms,
    nearer,
)
from recurrent_drafter.models.config import DraftShape

LONGEST = 10  # tokens to draft at most, where each of them has to pay
RECKONED = 8  # steps between two times that what is known of costs is reckoned with anew, unless one surprises:
SURPRISE = 0.05  # of the time expected, more or less
JOINING = 2e-4  # seconds, to begin with
MOST_FOUND = 48  # nodes to verify at most of what was looked up
SURE = 4  # how sure lookup is, in steps of half a doubling of the tokens that it is expected to yield
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
    """What drafted steps are like with about so many rows, where lookup is about so sure: running averages.

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

    def afresh(self, *, tried: bool) -> "TreeLoad":
        """What is known of the machine and of drafts, for another load; lengths that were ``tried`` are not again."""
        return replace(self, choice=self.choice.afresh(tried=tried), gains=self.gains.copy(), seen=0)

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
    shape has the beam width and the most tokens to draft; its nodes, if set, are the most to verify. Without one there
    is no drafter, and lookup alone.
    """

    def __init__(
        self, costs: Costs | LearnedCosts, shape: DraftShape | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.costs = costs if isinstance(costs, LearnedCosts) else LearnedCosts(costs)
        self.shape = shape
        self._clock = clock
        self._acceptance = AcceptanceByClaim()
        self._width, self._drafts = (1, 0) if shape is None else (shape.beam_width, shape.beam_length)
        self._most = max(MOST_FOUND, 1 + self._width * self._drafts)
        self._loads: dict[tuple[int, int], TreeLoad] = {}  # by the batch's magnitude in powers of two, and `SURE`
        self._load = TreeLoad(LengthChoice((self._drafts, 0), slowness=1.0), np.ones(self._most))
        self._batch = self._limit = self._level = self._levels = 0
        self._seconds = np.ones(1)  # [n - 1] is the expected time of verifying n nodes per row
        self._steps = self._of_batch = 0  # what that was reckoned after, and for
        self._since_plain = 0  # steps since one that verified the root alone
        self._alone = 1  # nodes to verify where nothing is drafted
        self._yield = 1.0  # tokens that they are expected to yield for a row
        self._reached = 1.0  # how often the newest level is expected to be accepted
        self._rate = 0.0  # tokens per second and row
        self._drafting = False
        self._joining = JOINING  # seconds of joining what was found to a draft
        self._joins = 0.0  # when that began
        self._began = self._untimed = 0.0  # when this part of the step did; what is expected of a draft within it

    def plan(self, batch: int, longest: int, found: Found | None = None) -> tuple[int, int]:
        """As far as `deeper` will go; or length 0, where lookup alone or plain autoregression is the faster."""
        self._began, self._untimed, self._batch = self._clock(), 0.0, batch
        self._level, self._levels, self._reached = 0, 0, 1.0
        if batch != self._of_batch or self._steps % RECKONED == 0:
            self._seconds = np.maximum.accumulate(self.costs.verifying(batch * np.arange(1, self._most + 2)))
            self._of_batch = batch
        self._steps += 1
        sure = self._weigh(found)
        load = batch.bit_length(), sure  # rows leave one by one: what 15 have shown holds for 14
        if load not in self._loads:
            self._loads[load] = self._load.afresh(tried=load[0] in (known for known, _ in self._loads))
        self._load = self._loads[load]
        self._limit = min(longest, self._drafts)
        self._drafting = self._limit > 0 and not self.costs.is_fresh and self._speculates()
        return (self._width, self._limit) if self._drafting else (1, 0)

    def _weigh(self, found: Found | None) -> int:
        """How many nodes of lookup to verify where nothing is drafted, and how sure these are."""
        plain = 1 + UNEVEN * math.log2(self._batch)
        self._alone = 1
        if found is None:
            self._yield = plain
            return 0
        yields = 1 + np.cumsum(best_first(found.probabilities)[: MOST_FOUND - 1])
        rates = yields / self._seconds[1 : len(yields) + 1]
        best = int(np.argmax(rates))
        lost = 1 - plain / self._seconds[0] / rates[best]
        is_due = self._drafts == 0 and self._since_plain >= COMPARE and PROBE_COST * self._since_plain >= lost
        if lost <= 0 or is_due or self.costs.is_fresh:
            self._yield = plain
            return 0
        self._alone, self._yield = best + 2, float(yields[best])
        return min(int(2 * math.log2(self._yield / plain)), SURE)

    def _speculates(self) -> bool:
        load, alone = self._load, self._yield
        seconds = {
            self._drafts: self._verifying(load.nodes) + load.levels * self._draft_level,
            0: self._verifying(self._alone),
        }
        self._rate = max(load.tokens / seconds[self._drafts], alone / seconds[0])
        return load.choice.choose({self._drafts: load.tokens, 0: alone}, seconds) > 0

    @property
    def _draft_level(self) -> float:
        """Seconds of drafting one level."""
        return self._load.drafting * self.costs.draft_level

    def _verifying(self, nodes: float) -> float:
        """Expected seconds of verifying so many nodes per row, which may be a fraction."""
        return float(np.interp(nodes, np.arange(1, len(self._seconds) + 1), self._seconds))

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
        return gain > self._rate * (self._draft_level + more)

    def claims(self, probabilities: Floats) -> Floats | None:  # (B, C)
        """Found nodes on the drafter's own scale, which is the one that measured acceptance translates from.

        They are joined where what they are expected to add takes longer to decode than joining does. A drafter that
        yields T tokens per step is taken to know all of it but a T-th part.
        """
        if not self._drafting:
            return None if self._alone == 1 else logarithms(probabilities)
        added = (self._yield - 1) / self._load.tokens
        self._joins = self._clock()
        if added < self._rate * self._joining:
            return None
        return np.where(probabilities > 0, self._acceptance.claims(probabilities), -np.inf)

    def budget(self, log_probs: Tensor, levels: int) -> int:  # (B, n)
        """The number of nodes with the best expected rate; of a draft at least one token."""
        self._levels = levels
        if levels == 0:
            return self._alone
        if log_probs.device.type == "cpu":
            if log_probs.shape[1] > levels * self._width:
                self._joining = nearer(self._joining, self._clock() - self._joins, MEMORY)
            drafting = self._clock() - self._began
            self._began += drafting
            self._load.drafting = nearer(self._load.drafting, drafting / (levels * self.costs.draft_level), MEMORY)
            gains = best_first(self._acceptance(log_probs.numpy()))
        else:
            self._untimed = levels * self.costs.draft_level
            drafting, gains = self._load.drafting * self._untimed, self._load.gains
        assert self.shape is not None
        most = min(log_probs.shape[1], self._most, (self.shape.max_tree_nodes or self._most + 1) - 1)
        seconds = drafting + self._seconds[1 : most + 1]
        return int(np.argmax((1 + np.cumsum(gains[:most])) / seconds)) + 2

    def observe(self, step: Step) -> None:
        """Learn the step's cost and what was accepted."""
        batch, nodes = step.log_probs.shape
        load, levels = self._load, self._levels
        seconds = self._clock() - self._began
        load.choice.tried(self._drafts if levels else 0)
        self._since_plain = 0 if nodes == 1 else self._since_plain + 1
        if self._untimed:  # what verifying does not take, drafting does
            load.drafting = nearer(load.drafting, (seconds - self._seconds[nodes - 1]) / self._untimed, MEMORY)
        elif abs(self.costs.took(batch * nodes, seconds) - 1) > SURPRISE:
            self._steps = 0
        if levels == 0:
            return
        if levels < self._limit or self._limit == self._drafts:  # not cut short by the reply's end
            load.drafted(sum(step.n_accepted) / batch + 1, levels, nodes)
        accepted = np.zeros((batch, nodes), dtype=bool)
        np.put_along_axis(accepted, np.asarray(step.path), values=True, axis=1)
        drafted = step.sources == DRAFTER
        self._acceptance.verified(step.log_probs[drafted], accepted[drafted])
        if self._untimed:
            load.verified(best_first(self._acceptance(step.log_probs[:, 1:])))


def best_first(probabilities: npt.NDArray[Any]) -> Floats:  # (B, n) -> (n,)
    """What each further node is expected to yield for a row, the best nodes first."""
    return np.sort(probabilities, axis=1)[:, ::-1].mean(0)
