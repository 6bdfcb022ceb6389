"""What speculation could yield here at best, and how much of it decoding reaches.

A step that drafts and verifies n nodes takes t(n) + t_draft and yields E(n) tokens; plain autoregression takes t(1) for
one. So no tree of fixed size is faster than autoregression by more than the largest E(n) t(1) / (t(n) + t_draft). All
are measured: the times at the cell's own batch and context, E along the replies that the cell's arms generated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from recurrent_drafter.bench.oracle import OracleDrafter
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.arms import Batch
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.measure.tuning import packed_costs
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 41, 48, 64)
MOST_REPLIES = 16

# Draft length and nodes verified (the root included) to expected tokens per step.
Expected = Callable[[int, int], float]


@dataclass(frozen=True)
class Attainable:
    """The best speed-up over autoregression, and the tree that gives it: draft length 0 is autoregression itself."""

    speedup: float
    length: int
    nodes: int


def attainable(costs: Costs, expected: Expected, lengths: Sequence[int], width: int) -> Attainable:
    """The largest E(n) t(1) / (t(n) + t_draft) over these draft lengths and all measured n.

    >>> costs = Costs(rows=(1, 2, 3), verify=(4.0, 5.0, 7.0), draft_level=1.0)
    >>> attainable(costs, lambda length, nodes: float(nodes), lengths=[1, 2], width=1)
    Attainable(speedup=1.3333333333333333, length=1, nodes=2)
    """
    best, plain = Attainable(1.0, 0, 1), costs.step(None)
    for length in lengths:
        for nodes in (rows // costs.batch for rows in costs.rows):
            if 1 < nodes <= 1 + length * width:
                speedup = expected(length, nodes) * plain / costs.step(DraftShape(width, length, nodes))
                best = max(best, Attainable(speedup, length, nodes), key=lambda found: found.speedup)
    return best


def costs_at(verifier: Verifier, drafter: RecurrentDrafter, batch: Batch, width: int, longest: int) -> Costs:
    """What steps and drafts of this width take after prompts like those of ``batch``, as decoding runs them."""
    rows, context = batch.input_ids.shape
    counts = [count for count in NODES if count <= 1 + width * longest]
    lengths = range(1, longest + 1)
    return packed_costs(verifier, drafter, context, batch=rows, rows=counts, widths=(width,), lengths=lengths)


def expected_along(verifier: Verifier, drafter: RecurrentDrafter, replies: Sequence[Reply], width: int) -> Expected:
    """Tokens per step that fixed trees would have yielded on known replies, from one drafting pass for each length.

    An oracle's acceptance needs no pass: its hits are known.
    """
    chosen = replies[:MOST_REPLIES]
    if isinstance(drafter, OracleDrafter):
        runs = [_run_lengths(drafter, reply) for reply in chosen]
        return lambda length, nodes: _tokens_per_step([[min(n, length, nodes - 1) for n in run] for run in runs])
    held, search = HeldOutReplies(verifier, chosen), BeamDrafter(drafter, verifier.embed)
    drafts: dict[int, list[Beams]] = {}

    def expected(length: int, nodes: int) -> float:
        with torch.inference_mode():
            if length not in drafts:
                drafts[length] = [
                    search(hiddens, reply.tokens.to(hiddens.device), width, length)
                    for reply, hiddens in zip(held.replies, held.hiddens, strict=True)
                ]
            accepted = []
            for reply, beams in zip(held.replies, drafts[length], strict=True):
                root = reply.tokens.to(beams.tokens.device)
                accepted.append(accepted_along(root, prefix_tree(root, beams, nodes)).n_accepted.tolist())
        return _tokens_per_step(accepted)

    return expected


def _run_lengths(drafter: OracleDrafter, reply: Reply) -> list[int]:
    """For each token of the reply as root, how many places in a row the oracle would be right after it."""
    hits = drafter.hits(reply.prompt, len(reply.tokens)).tolist()
    runs = [0] * len(hits)
    for place in reversed(range(len(hits) - 1)):
        runs[place] = runs[place + 1] + 1 if hits[place + 1] else 0
    return runs


def _tokens_per_step(accepted: Sequence[list[int]]) -> float:
    return sum((walk(row) for row in accepted), Walk(0, 0)).tokens_per_step
