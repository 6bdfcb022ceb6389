"""Which shape of draft pays on this machine: measured costs and acceptance, a prediction, a check.

A step at a shape of W beams, L tokens and N nodes yields the tokens that the acceptance walk finds along the verifier's
own replies, and takes t(N) and the drafting. So hundreds of shapes are compared without decoding with one of them, and
only the few best have to prove themselves.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.core.metrics import Walk, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.costs import Costs, Tuning, conditions
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import AUTO, PLAIN, Decoding
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along, greedy_replies
from recurrent_drafter.measure.ruler import Estimate, Trial, compare, ratio, tokens_per_step
from recurrent_drafter.measure.step_costs import MEASURED_ROWS, packed_costs
from recurrent_drafter.measure.verification import Comparison
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter

AND_LOOKUP = " + lookup"  # after a shape's label
MOST_NODES = 64
NODES = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, MOST_NODES)
REPLIES = 32  # of the verifier at a time
Grid = dict[tuple[int, int], float]  # (width, length) -> a figure


@dataclass(frozen=True)
class DraftRanks:
    """How the drafts of one beam width fare along known replies, at every length and number of nodes at once.

    ``ranks`` has for each reply (R, L, L): entry [i, l - 1, d - 1] counts the nodes that go before the d-th accepted
    one when the draft at the reply's token i is l tokens long (`REJECTED` where no d-th is accepted). A tree of N nodes
    holds those of rank below N.
    """

    ranks: list[Tensor]

    def walks(self, length: int, nodes: int) -> list[Walk]:
        """What greedy decoding makes of each reply at this length, with at most so many nodes."""
        return [walk((ranks[:, length - 1] < nodes).sum(-1).tolist()) for ranks in self.ranks]

    def tokens_per_step(self, length: int, nodes: int) -> float:
        """Of all these walks together."""
        return sum(self.walks(length, nodes), Walk(0, 0)).tokens_per_step


REJECTED = torch.iinfo(torch.int64).max


def measure_acceptance(held_out: HeldOutReplies, drafter: RecurrentDrafter, width: int, length: int) -> DraftRanks:
    """Draft once at every token of the replies; shorter drafts are the beginnings of these."""
    ranks = []
    for root, beams in held_out.drafts(drafter, width, length):
        tree = prefix_tree(root, beams, 1 + width * length)
        accepted = accepted_along(root, tree)
        ranks.append(path_ranks(tree.log_probs, accepted.path, accepted.n_accepted, width).cpu())
    return DraftRanks(ranks)


def path_ranks(log_probs: Tensor, path: Tensor, n_accepted: Tensor, width: int) -> Tensor:
    """`DraftRanks.ranks` of a whole lattice's log-probabilities (R, 1 + L W) and the paths (R, M) through it."""
    rows, nodes = log_probs.shape
    length = (nodes - 1) // width
    number = torch.arange(nodes, device=path.device)
    levels = torch.arange(1, length + 1, device=path.device)
    ranks = torch.full((rows, length, length), REJECTED, device=path.device)
    for depth in range(1, path.shape[1]):
        node = path[:, depth, None]
        own = log_probs.gather(1, node)
        before = (log_probs > own) | ((log_probs == own) & (number < node))  # as `prefix_tree` sorts
        rank = 1 + before[:, 1:].view(rows, length, width).sum(2).cumsum(1)  # (R, L): the root, and up to each level
        counts = (n_accepted >= depth)[:, None] & (levels >= depth)
        ranks[:, :, depth - 1] = torch.where(counts, rank, REJECTED)
    return ranks


@dataclass(frozen=True)
class Prediction:
    """What a shape is expected to yield in a step, and how much faster than autoregression it should be."""

    shape: DraftShape
    tokens_per_step: float
    speedup: float


def predict(acceptances: dict[int, DraftRanks], single: Costs, full: Costs, lengths: Sequence[int]) -> list[Prediction]:
    """All shapes at which acceptance and costs are known, the fastest first.

    Replies are taken in batches as they will be decoded: a batch goes on, with fewer rows, until its last row is done.
    """
    found = []
    for width, acceptance in acceptances.items():
        for length in lengths:
            whole = 1 + width * length
            for nodes in sorted({n for n in NODES if n < whole} | {min(whole, MOST_NODES)}):
                found.append(
                    prediction(DraftShape(width, length, nodes), acceptance.walks(length, nodes), single, full)
                )
    return sorted(found, key=lambda prediction: -prediction.speedup)


def prediction(shape: DraftShape, walks: Sequence[Walk], single: Costs, full: Costs) -> Prediction:
    """Of a shape with which decoding takes these walks along the replies."""
    drafted = _seconds([walk.steps for walk in walks], shape, single, full)
    plain = _seconds([walk.tokens for walk in walks], None, single, full)
    return Prediction(shape, sum(walks, Walk(0, 0)).tokens_per_step, plain / drafted)


def _seconds(steps: Sequence[int], shape: DraftShape | None, single: Costs, full: Costs) -> float:
    """What replies that take so many steps cost, ``full.batch`` at a time; between one row and all, linearly."""
    one, all_rows, batch = single.step(shape), full.step(shape), full.batch
    slope = (all_rows - one) / (batch - 1) if batch > 1 else 0.0
    seconds = 0.0
    for start in range(0, len(steps), batch):
        ending = sorted(steps[start : start + batch])
        for finished, (before, after) in enumerate(itertools.pairwise([0, *ending])):
            seconds += (after - before) * (one + slope * (len(ending) - finished - 1))
    return seconds


def best_of_each_cell(predictions: Sequence[Prediction]) -> dict[tuple[int, int], Prediction]:
    """The best number of nodes for every width and length, the fastest first."""
    cells: dict[tuple[int, int], Prediction] = {}
    for prediction in sorted(predictions, key=lambda prediction: -prediction.speedup):
        cells.setdefault((prediction.shape.beam_width, prediction.shape.beam_length), prediction)
    return cells


Tracked = Callable[[Sequence[Any], str, str], Iterable[Any]]  # things to do, why, and their name: shows how far it is


@dataclass(frozen=True)
class Search:
    """What is tuned, with what, and which shapes are tried; the ``confirm`` best of them prove themselves."""

    speculator: RecurrentDraftingSpeculator
    prompts: Sequence[Tensor]
    decoding: Decoding
    batch_sizes: Sequence[int]
    widths: Sequence[int]
    lengths: Sequence[int]
    confirm: int = 3
    tracked: Tracked = lambda things, said, unit: things  # noqa: ARG005

    @property
    def drafter(self) -> RecurrentDrafter:
        assert self.speculator.drafter is not None
        return self.speculator.drafter

    def run(self) -> tuple[list["BatchFindings"], Costs]:
        """Acceptance once; costs, predictions and their check at every batch size; and a single sequence's costs."""
        held_out = self._held_out()
        acceptances = self._acceptances(held_out)
        sizes = list(dict.fromkeys([1, *self.batch_sizes]))
        costs = {batch: self._costs(batch) for batch in self.tracked(sizes, "costs at each batch size", "sizes")}
        findings = []
        for batch in self.batch_sizes:
            cells = best_of_each_cell(predict(acceptances, costs[1], costs[batch], self.lengths))
            best = list(cells.values())[: self.confirm]
            looked_up = self._with_lookup(held_out, best, costs[1], costs[batch]) if self.speculator.lookup else {}
            trials = self._check(batch, best, looked_up, costs[1])
            findings.append(BatchFindings(batch, costs[batch], cells, trials, looked_up))
        return findings, costs[1].of_width(findings[0].best.shape.beam_width)

    def _held_out(self) -> HeldOutReplies:
        verifier, decoding = self.speculator.verifier, self.decoding
        replies: list[Reply] = []
        batches = [self.prompts[start : start + REPLIES] for start in range(0, len(self.prompts), REPLIES)]
        for prompts in self.tracked(batches, "the verifier's own replies", "batches"):
            replies += greedy_replies(verifier, prompts, decoding.new_tokens, decoding.end_ids)
        return HeldOutReplies(verifier, replies)

    def _acceptances(self, held_out: HeldOutReplies) -> dict[int, DraftRanks]:
        longest = max(self.lengths)
        widths = self.tracked(self.widths, "acceptance at each width", "widths")
        return {width: measure_acceptance(held_out, self.drafter, width, longest) for width in widths}

    def _with_lookup(
        self, held_out: HeldOutReplies, best: Sequence[Prediction], single: Costs, full: Costs
    ) -> dict[str, Prediction]:
        """The same shapes where lookup joins the tree, by their labels."""
        found = {}
        for shape in (one.shape for one in best):
            drafts = [beams for _, beams in held_out.drafts(self.drafter, shape.beam_width, shape.beam_length)]
            found[label(shape)] = prediction(shape, held_out.walks_with_lookup(shape, drafts), single, full)
        return found

    def _costs(self, batch: int) -> Costs:
        """In the middle of replies to prompts of the usual length."""
        context = sorted(map(len, self.prompts))[len(self.prompts) // 2] + self.decoding.new_tokens // 2
        most = min(MOST_NODES, 1 + max(self.widths) * max(self.lengths))
        timed = {"rows": [n for n in MEASURED_ROWS if n <= most], "widths": self.widths, "lengths": self.lengths}
        return packed_costs(self.speculator.verifier, self.drafter, context, batch=batch, **timed)

    def _check(
        self, batch: int, best: Sequence[Prediction], looked_up: dict[str, Prediction], single: Costs
    ) -> list[Trial]:
        """Decode with the best shapes, the best with lookup and `auto`; autoregression's output is the reference."""
        speculator, verifier, top = self.speculator, self.speculator.verifier, best[0].shape
        decoders = {PLAIN: speculator.without_drafter()}
        decoders |= {label(found.shape): speculator.with_shape(found.shape) for found in best}
        if looked_up:
            joined = max(looked_up.values(), key=lambda one: one.speedup).shape
            decoders[label(joined) + AND_LOOKUP] = speculator.with_shape(joined).with_lookup(True)
        tuning = Tuning(top, single.of_width(top.beam_width), conditions(verifier.model))
        decoders[AUTO] = speculator.with_tuning(tuning)
        arms = [ways.our_arm(name, decoder, self.decoding) for name, decoder in decoders.items()]
        batches = ways.batches_of(self.prompts, batch, verifier.device, whole=False)
        said = f"decoding at batch {batch}, {len(arms)} ways"
        return list(compare(arms, self.tracked(batches, said, "batches"), ways.explaining(verifier, self.decoding)))


@dataclass(frozen=True)
class BatchFindings:
    """What was measured at one batch size: costs, each cell's best prediction, and the trials that checked some."""

    batch: int
    costs: Costs
    cells: dict[tuple[int, int], Prediction]
    trials: Sequence[Trial]
    looked_up: dict[str, Prediction] = field(default_factory=dict)  # where lookup joins the tree, by the shape's label

    @property
    def predicted(self) -> dict[str, Prediction]:
        """Of what was decoded with, by arm."""
        return {label(cell.shape): cell for cell in self.cells.values()} | {
            arm + AND_LOOKUP: found for arm, found in self.looked_up.items()
        }

    @property
    def arms(self) -> list[str]:
        return list(self.trials[0].runs)

    @property
    def best(self) -> Prediction:
        """The fastest shape of those that were decoded with."""
        tried = [cell for cell in self.cells.values() if label(cell.shape) in self.arms]
        return max(tried, key=lambda cell: self.speedup(label(cell.shape)).value)

    def speedup(self, arm: str, *, decoding_only: bool = False) -> Estimate:
        """Over autoregression, of the whole reply."""
        return ratio(self.trials, arm, PLAIN, decoding_only=decoding_only)

    @property
    def differing(self) -> list[Comparison]:
        """Every divergence from autoregression's output."""
        compared = (
            Comparison(number, PLAIN, arm, judged)
            for trial in self.trials
            for arm, verdicts in trial.verdicts.items()
            for number, judged in zip(trial.batch.row_ids, verdicts, strict=True)
        )
        return [found for found in compared if found.verdict.divergence is not None]

    def as_record(self) -> dict[str, Any]:
        drafts = [{"beam_width": w, "beam_length": n, "seconds": taken} for (w, n), taken in self.costs.drafts.items()]
        decoded = {
            arm: {
                "tokens_per_step": tokens_per_step(self.trials, arm),
                "speedup": astuple(self.speedup(arm)),
                "decoding_only": astuple(self.speedup(arm, decoding_only=True)),
            }
            for arm in self.arms
        }
        costs = {"rows": self.costs.rows, "verify": self.costs.verify, "draft": drafts}
        names = ("predicted", self.cells), ("predicted_with_lookup", self.looked_up)
        predicted = {name: list(map(asdict, found.values())) for name, found in names}
        return {"batch_size": self.batch, "costs": costs, **predicted, "decoded": decoded}


def label(shape: DraftShape) -> str:
    """A shape in a table: beams x length, and its nodes."""
    return f"{shape.beam_width} x {shape.beam_length}, {shape.nodes} nodes"
