"""Which shape of draft pays on this machine: measured costs and acceptance, a prediction, a check.

A step at a shape of W beams, L tokens and N nodes yields the tokens that the acceptance walk finds along the verifier's
own replies, and takes t(N) and the drafting. So hundreds of shapes are compared without decoding with one of them, and
only the few best have to prove themselves.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.core.metrics import Walk, median_interval, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.costs import MEASURED_ROWS, Costs, least_seconds, measure_costs
from recurrent_drafter.decoding.decode import BeamDrafter, Draft, Pace, decode
from recurrent_drafter.decoding.generation_state import Stop
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.measure.replies import HeldOutReplies, accepted_along
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

MOST_NODES = 64
NODES = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, MOST_NODES)
Grid = dict[tuple[int, int], float]  # (width, length) -> a figure


@dataclass(frozen=True)
class Acceptance:
    """How the drafts of one beam width fare along known replies, at every length and number of nodes at once.

    ``ranks`` has for each reply (R, L, L): entry [i, l - 1, d - 1] counts the nodes that go before the d-th accepted
    one when the draft at the reply's token i is l tokens long (`REJECTED` where no d-th is accepted). A tree of N nodes
    holds those of rank below N.
    """

    ranks: list[Tensor]

    def walks(self, length: int, nodes: int) -> list[Walk]:
        """What greedy decoding makes of each reply at this length, with at most so many nodes."""
        return [walk((ranks[:, length - 1] < nodes).sum(-1).tolist()) for ranks in self.ranks]


REJECTED = torch.iinfo(torch.int64).max


def measure_acceptance(held_out: HeldOutReplies, drafter: RecurrentDrafter, width: int, length: int) -> Acceptance:
    """Draft once at every token of the replies; shorter drafts are the beginnings of these."""
    draft = BeamDrafter(drafter, held_out.verifier.embed)
    ranks = []
    with torch.inference_mode():
        for tokens, hiddens in held_out.pairs():
            root = tokens.to(hiddens.device)
            beams = draft(hiddens.to(drafter.dtype), root, width, length)
            tree = prefix_tree(root, beams, 1 + width * length)
            accepted = accepted_along(root, tree)
            ranks.append(path_ranks(tree.log_probs, accepted.path, accepted.n_accepted, width).cpu())
    return Acceptance(ranks)


def path_ranks(log_probs: Tensor, path: Tensor, n_accepted: Tensor, width: int) -> Tensor:
    """`Acceptance.ranks` of a whole lattice's log-probabilities (R, 1 + L W) and the paths (R, M) through it."""
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
class BatchCosts:
    """What a step costs with ``batch`` rows: verifying (by the nodes of all rows together) and drafting, in seconds."""

    batch: int
    verify: Costs
    drafting: Grid

    def __call__(self, shape: DraftShape | None) -> float:
        """A step at a shape; without one, of plain autoregression."""
        nodes = 1 if shape is None else shape.nodes
        drafting = 0.0 if shape is None else self.drafting[shape.beam_width, shape.beam_length]
        return float(self.verify.verifying(self.batch * nodes)) + drafting

    def of_width(self, width: int) -> Costs:
        """The costs as `AutoPace` takes them, with what one more token of this width's drafts takes."""
        lengths = sorted(length for other, length in self.drafting if other == width)
        first, last = (self.drafting[width, length] for length in (lengths[0], lengths[-1]))
        level = (last - first) / (lengths[-1] - lengths[0]) if len(lengths) > 1 else last / lengths[0]
        return dataclasses.replace(self.verify, draft_level=max(level, 1e-6))


def measure_batch_costs(
    verifier: Verifier,
    drafter: RecurrentDrafter,
    batch: int,
    context: int,
    widths: Sequence[int],
    lengths: Sequence[int],
) -> BatchCosts:
    """Time steps and drafts of ``batch`` rows behind ``context`` tokens."""
    hidden = torch.zeros(batch, verifier.hidden_size, dtype=verifier.model.dtype, device=verifier.device)
    root = torch.zeros(batch, dtype=torch.int64, device=verifier.device)
    most = min(MOST_NODES, 1 + max(widths) * max(lengths))
    rows = [count for count in MEASURED_ROWS if count <= most]

    draft = BeamDrafter(drafter, verifier.embed)

    def drafted(width: int, length: int) -> None:
        draft(hidden, root, width, length).log_probs.tolist()

    drafting: Grid = {}
    with torch.inference_mode():
        costs = measure_costs(verifier, draft, context, batch=batch, rows=rows, widths=widths[:1])
        for width in widths:
            seconds = least_seconds([partial(drafted, width, length) for length in lengths], repeats=5)
            line = np.polynomial.Polynomial.fit(lengths, seconds, deg=min(1, len(lengths) - 1))  # every level is alike
            drafting |= {(width, length): max(float(line(length)), 1e-6) for length in lengths}
    return BatchCosts(batch, costs, drafting)


@dataclass(frozen=True)
class Prediction:
    """What a shape is expected to yield in a step, and how much faster than autoregression it should be."""

    shape: DraftShape
    tokens_per_step: float
    speedup: float


def predict(
    acceptances: dict[int, Acceptance], single: BatchCosts, full: BatchCosts, lengths: Sequence[int]
) -> list[Prediction]:
    """All shapes at which acceptance and costs are known, the fastest first.

    Replies are taken in batches as they will be decoded: a batch goes on, with fewer rows, until its last row is done.
    """
    found = []
    for width, acceptance in acceptances.items():
        for length in lengths:
            whole = 1 + width * length
            for nodes in sorted({n for n in NODES if n < whole} | {min(whole, MOST_NODES)}):
                shape, walks = DraftShape(width, length, nodes), acceptance.walks(length, nodes)
                drafted = _seconds([walk.steps for walk in walks], shape, single, full)
                plain = _seconds([walk.tokens for walk in walks], None, single, full)
                found.append(Prediction(shape, sum(walks, Walk(0, 0)).tokens_per_step, plain / drafted))
    return sorted(found, key=lambda prediction: -prediction.speedup)


def _seconds(steps: Sequence[int], shape: DraftShape | None, single: BatchCosts, full: BatchCosts) -> float:
    """What replies that take so many steps cost, ``full.batch`` at a time; between one row and all, linearly."""
    one, all_rows, batch = single(shape), full(shape), full.batch
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


@dataclass(frozen=True)
class Timed:
    """One batch decoded: the replies, and steps (summed over rows) and seconds behind prefill."""

    replies: list[list[int]]
    steps: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Those that the steps emitted; prefill's own are not among them."""
        return sum(map(len, self.replies)) - len(self.replies)


def decode_timed(
    verifier: Verifier,
    draft: Draft,
    pace: Pace,
    batch: tuple[Tensor, Tensor],
    new_tokens: int,
    end_ids: Sequence[int],
) -> Timed:
    """Decode prompts and mask (B, S) greedily, with the clock started when prefill is done."""
    input_ids, attention_mask = batch
    stop = Stop(input_ids, new_tokens, end_ids)
    with torch.inference_mode():
        steps = decode(verifier, draft, pace, input_ids, attention_mask, stop, Sampler(stop))
        next(steps)
        begun = time.perf_counter()
        for _ in steps:
            pass
        return Timed(stop.generated, sum(stop.steps), time.perf_counter() - begun)


def confirm(
    decoders: dict[str, Callable[[tuple[Tensor, Tensor]], Timed]],
    batches: Sequence[tuple[Tensor, Tensor]],
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[Timed]]:
    """Decode every batch in every way, the order changing from batch to batch; the first once more in front."""
    names = list(decoders)
    timed: dict[str, list[Timed]] = {name: [] for name in names}
    for decoder in decoders.values():
        decoder(batches[0])
    for number, batch in enumerate(batches):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            timed[name].append(decoders[name](batch))
        done()
    return timed


def tokens_per_step(runs: Sequence[Timed]) -> float:
    """Tokens that a row gets from a step."""
    return sum(run.tokens for run in runs) / max(sum(run.steps for run in runs), 1)


def speedup(runs: Sequence[Timed], base: Sequence[Timed]) -> tuple[float, float, float]:
    """Median over the batches of the ratio of tokens per second, with its 95 % interval."""
    ratios = [
        (own.tokens / own.seconds) / (other.tokens / other.seconds)
        for own, other in zip(runs, base, strict=True)
        if own.tokens and other.tokens
    ]
    return (float(np.median(ratios)) if ratios else float("nan"), *median_interval(ratios))
