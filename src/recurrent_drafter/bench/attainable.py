"""What speculation could yield here at best, and how much of it decoding reaches.

A step that verifies n nodes behind a draft takes t(n) + t_draft and yields E(n) tokens; plain autoregression takes t(1)
for one. So no tree of fixed size is faster than autoregression by more than the largest E(n) t(1) / (t(n) + t_draft).
All three are measured: t at the cell's own batch and context, E along the replies that the cell's arms generated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from recurrent_drafter.bench.oracle import OracleDrafter
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk, walk
from recurrent_drafter.core.tree import prefix_tree, root_tree
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.comparison import Batch, now
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier

NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 41, 48, 64)
MOST_REPLIES = 16

# Draft length and nodes verified (the root included) to expected tokens per step.
Expected = Callable[[int, int], float]


@dataclass(frozen=True)
class Curves:
    """Medians in seconds: ``verify`` of a pass over ``nodes`` for each row, ``draft`` of 1, 2, ... tokens."""

    nodes: tuple[int, ...]
    verify: tuple[float, ...]
    draft: tuple[float, ...]


@dataclass(frozen=True)
class Attainable:
    """The best speed-up over autoregression, and the tree that gives it: draft length 0 is autoregression itself."""

    speedup: float
    length: int
    nodes: int


def attainable(curves: Curves, expected: Expected, lengths: Sequence[int], width: int) -> Attainable:
    """The largest E(n) t(1) / (t(n) + t_draft) over these draft lengths and all measured n.

    >>> curves = Curves(nodes=(1, 2, 3), verify=(4.0, 5.0, 7.0), draft=(1.0, 2.0))
    >>> attainable(curves, lambda length, nodes: float(nodes), lengths=[1, 2], width=1)
    Attainable(speedup=1.3333333333333333, length=1, nodes=2)
    """
    best = Attainable(1.0, 0, 1)
    for length in lengths:
        for nodes, seconds in zip(curves.nodes, curves.verify, strict=True):
            if not 1 < nodes <= 1 + length * width:
                continue
            ratio = expected(length, nodes) * curves.verify[0] / (seconds + curves.draft[length - 1])
            if ratio > best.speedup:
                best = Attainable(ratio, length, nodes)
    return best


def measure_curves(
    verifier: Verifier, drafter: RecurrentDrafter, batch: Batch, width: int, longest: int, *, repeats: int = 7
) -> Curves:
    """Time passes and drafts behind the prompts of ``batch``, as decoding runs them: medians, after one to warm up.

    Both are timed ``repeats`` times in turn over all sizes, so that a slow moment does not fall on one of them.
    """
    rows, length = batch.input_ids.shape
    counts = [count for count in NODES if count <= 1 + width * longest]
    packed = PackedLinears(verifier.model), PackedLinears(drafter)
    with torch.inference_mode(), packed[0].applied(), packed[1].applied():
        session, read = verifier.open(batch.input_ids, batch.attention_mask, length + counts[-1])
        root, hidden = batch.input_ids[:, -1], read.hiddens[:, -1]
        search = BeamDrafter(drafter, verifier.embed)

        def verify(nodes: int) -> None:
            leaves = torch.zeros(rows, 1, nodes - 1, dtype=torch.int64, device=root.device)
            beams = Beams(leaves, leaves, leaves.float())
            session.forward_tree(prefix_tree(root, beams, nodes) if nodes > 1 else root_tree(root))

        def draft(levels: int) -> None:
            search(hidden, root, width, levels)

        works = [partial(verify, count) for count in counts] + [partial(draft, 1 + i) for i in range(longest)]
        seconds = _medians(works, repeats, root.device)
    return Curves(tuple(counts), tuple(seconds[: len(counts)]), tuple(seconds[len(counts) :]))


def _medians(works: Sequence[Callable[[], None]], repeats: int, device: torch.device) -> list[float]:
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, seconds in zip(works, taken, strict=True):
            begun = now(device)
            work()
            if turn:
                seconds.append(now(device) - begun)
    return [float(np.median(seconds)) for seconds in taken]


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
