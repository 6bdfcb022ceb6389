"""What steps and drafts take on this machine, timed one by one."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from timeit import timeit
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from recurrent_drafter.core.accept import follow_tree
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree, root_tree
from recurrent_drafter.decoding.costs import LEAST, Costs
from recurrent_drafter.decoding.decode import BeamDrafter, Draft
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier

MEASURED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
USUAL_LENGTH = 4  # of the draft that is timed


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


def packed_costs(verifier: Verifier, drafter: RecurrentDrafter, context: int, **options: Any) -> Costs:
    """`measure_costs` as decoding runs: weights packed, without gradients."""
    with torch.inference_mode(), PackedLinears(verifier.model).applied(), PackedLinears(drafter).applied():
        return measure_costs(verifier, BeamDrafter(drafter, verifier.embed), context, **options)
