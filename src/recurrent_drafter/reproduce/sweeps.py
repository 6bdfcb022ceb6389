"""The sweeps with one trained drafter: shapes of draft, the prefix tree, the size of the draft vocabulary."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk
from recurrent_drafter.measure.estimate import break_even
from recurrent_drafter.measure.replies import HeldOutReplies
from recurrent_drafter.measure.ruler import BUG
from recurrent_drafter.measure.step_costs import MEASURED_ROWS, packed_costs
from recurrent_drafter.measure.tuning import Search, label, measure_acceptance
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.reproduce.plan import DEPTHS
from recurrent_drafter.training.estimation import measured_costs
from recurrent_drafter.training.examples import RootExample, coverage, frequent_tokens
from recurrent_drafter.training.trainer import default_shape


def distinct_prefixes(beams: Beams) -> Tensor:  # (B,)
    """How many tokens the beams of full length hold when each prefix counts once; W L when it counts for every beam.

    >>> planet, dot, and_, with_, in_ = range(5)                # planet and, planet with, dot in
    >>> distinct_prefixes(Beams(
    ...     tokens=torch.tensor([[[planet, dot, in_], [and_, with_, in_]]]),
    ...     parents=torch.tensor([[[0, 0, 0], [0, 0, 1]]]),
    ...     log_probs=torch.zeros(1, 2, 3))).tolist()
    [5]
    """
    batch, length, width = beams.tokens.shape
    alive = torch.ones(batch, width, dtype=torch.bool, device=beams.tokens.device)
    counts = alive.sum(1)
    for level in range(length - 1, 0, -1):
        parents = beams.parents[:, level].masked_fill(~alive, width)  # a slot that no beam goes through
        alive = torch.zeros(batch, width + 1, dtype=torch.bool, device=alive.device).scatter_(1, parents, True)
        alive = alive[:, :width]
        counts = counts + alive.sum(1)
    return counts


def vocabulary_sizes(size: int) -> list[int]:
    """Powers of two from 128 on that are below a drafter's own size, and that.

    >>> vocabulary_sizes(700)
    [128, 256, 512, 700]
    """
    return [*(2**power for power in range(7, (size - 1).bit_length())), size]


def with_fewer_tokens(drafter: RecurrentDrafter, kept: Tensor) -> RecurrentDrafter:  # (d,) of the verifier's ids
    """The same drafter, able to draft only these of its tokens: rows of its head are left out, nothing is trained."""
    rows = torch.isin(drafter.draft_ids, kept.to(drafter.draft_ids.device))
    smaller = copy.deepcopy(drafter)
    head = smaller.lm_head[-1]
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight[rows], requires_grad=False)
    head.out_features = len(head.weight)
    smaller.draft_ids = smaller.draft_ids[rows]
    smaller.config.draft_vocab_size = len(smaller.draft_ids)
    return smaller


def sweep_of_shapes(search: Search, held_out: HeldOutReplies) -> dict[str, Any]:
    """Beam widths and lengths at every batch size, by `tune`'s own measurements; then whole trees along replies."""
    batches = []
    for found in search.run()[0]:
        outcomes = [differing.verdict.outcome for differing in found.differing]
        bugs = outcomes.count(BUG)
        told = {"best": label(found.best.shape), "bugs": bugs, "ties": len(outcomes) - bugs}
        batches.append({**found.as_record(), **told})
    whole = []
    for width in search.widths:
        acceptance = measure_acceptance(held_out, search.drafter, width, max(search.lengths))
        for length in search.lengths:
            walks = acceptance.walks(length, 1 + width * length)
            whole.append({"beam_width": width, "beam_length": length, **walked(walks)})
    asked = {"prompts": len(search.prompts), "new_tokens": search.decoding.new_tokens}
    return {**asked, "whole": whole, "batches": batches}


def sweep_of_trees(held_out: HeldOutReplies, drafter: RecurrentDrafter, widths: Sequence[int]) -> dict[str, Any]:
    """What merging the beams' prefixes saves: tokens to verify, and the time of verifying them."""
    widths = [width for width in widths if 1 < width <= len(drafter.draft_ids)]
    context = max(len(held_out.replies[0].prompt), 1)
    most = 1 + max(widths, default=1) * DEPTHS
    timed = [count for count in MEASURED_ROWS if count < most] + [most]
    costs = packed_costs(held_out.verifier, drafter, context, rows=timed)
    rows = []
    for width in widths:
        counts = [distinct_prefixes(beams) for _, beams in held_out.drafts(drafter, width, DEPTHS)]
        size = float(torch.cat(counts).float().mean())  # over drafts at every token of the replies
        apart, merged = costs.verifying([1 + width * DEPTHS, 1 + round(size)]).tolist()
        tokens = {"beam_width": width, "beam_length": DEPTHS, "candidates": width * DEPTHS, "distinct": size}
        rows.append({**tokens, "seconds_apart": apart, "seconds_merged": merged})
    return {"rows": rows}


def sweep_of_vocabularies(
    held_out: HeldOutReplies, drafter: RecurrentDrafter, examples: Sequence[RootExample], end_ids: Sequence[int]
) -> dict[str, Any]:
    """The same drafter with ever fewer tokens that it can draft, the most frequent ones."""
    verifier, shape = held_out.verifier, default_shape(DEPTHS, len(drafter.draft_ids))
    rows = []
    for size in vocabulary_sizes(len(drafter.draft_ids)):
        kept = frequent_tokens(examples, size, verifier.vocab_size, end_ids)
        smaller = with_fewer_tokens(drafter, kept)
        acceptance = measure_acceptance(held_out, smaller, shape.beam_width, shape.beam_length)
        walks = acceptance.walks(shape.beam_length, shape.nodes)
        costs = measured_costs(smaller, verifier)
        speed = acceptance.tokens_per_step(shape.beam_length, shape.nodes) / break_even(costs, shape)
        cost = {"draft_level": costs.draft_level, "plain_step": costs.verify[0], "predicted_speedup": speed}
        rows.append({"size": size, "coverage": coverage(examples, kept), **cost, **walked(walks)})
    return {"rows": rows, **asdict(shape)}


def walked(walks: Sequence[Walk]) -> dict[str, list[int]]:
    return {"steps": [walk.steps for walk in walks], "tokens": [walk.tokens for walk in walks]}
