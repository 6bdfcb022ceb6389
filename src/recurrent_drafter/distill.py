"""The paper's distilled targets (section 4.3.3), for all positions at once (layer 3).

The targets of a root at position p are the verifier's own next K tokens from the prefix [0..p]. Depth 1 falls out of
the ordinary forward pass. For each further depth one token per root is fed, seeing its own prefix of the text and its
own generated ancestors: K passes in place of one `generate` per position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_drafter.cache import TreeCache
from recurrent_drafter.data import TrainExample
from recurrent_drafter.rows import RootExample, cut_behind_end, loss_mask
from recurrent_drafter.verifier import Verifier


@torch.inference_mode()
def distilled_targets(
    verifier: Verifier,
    input_ids: Tensor,
    roots: Tensor,
    depths: int,
    end_ids: tuple[int, ...],
    chunk: int = 96,
) -> Tensor:
    """The verifier's greedy continuations of every marked prefix.

    Args:
        input_ids: (S,), one text.
        roots: (S,) bool; position p asks for the continuation of the prefix [0..p].
        depths: K, tokens per continuation.
        end_ids: tokens that end a continuation; none for text that goes on.
        chunk: roots that run together. Each pass attends to S + chunk (d - 1) columns, most of the latter masked.

    Returns:
        (P, K) int64 for the P marked positions in order; `IGNORED` behind an end token.
    """
    (length,) = input_ids.shape
    positions = roots.nonzero()[:, 0]  # (P,)
    device, dtype = input_ids.device, verifier.model.dtype
    hidden = torch.finfo(dtype).min
    cache = TreeCache(verifier.config.num_hidden_layers, length + chunk * (depths - 1))
    everywhere = torch.arange(length, device=device)
    causal = torch.full((length, length), hidden, dtype=dtype, device=device).triu(1)
    first = verifier.forward(
        input_ids[None], everywhere[None], causal[None], cache, distance=(everywhere[:, None] - everywhere)[None]
    )
    cache.keep_all()
    own = torch.full((chunk, chunk), hidden, dtype=dtype, device=device).fill_diagonal_(0)
    chunks = []
    for root in positions.split(chunk):
        (count,) = root.shape
        cache.lengths = [length]  # the text stays, the last chunk's generated tokens go
        targets = [first.logits[0, root].argmax(-1)]
        visible = causal[root]  # (count, S): each root sees its own prefix of the text
        columns = everywhere  # the positions that the columns stand for
        for depth in range(1, depths):
            visible = torch.cat([visible, own[:count, :count]], dim=1)
            columns = torch.cat([columns, root + depth])
            distance = (root + depth)[:, None] - columns
            step = verifier.forward(
                targets[-1][None], (root + depth)[None], visible[None], cache, distance=distance[None]
            )
            cache.lengths = [len(columns)]
            targets.append(step.logits[0].argmax(-1))
        chunks.append(torch.stack(targets, dim=1))
    every = torch.cat(chunks) if chunks else positions.new_empty(0, depths)
    return cut_behind_end(every, end_ids)


def with_distilled_targets(
    verifier: Verifier, example: TrainExample, depths: int, end_ids: Sequence[int]
) -> RootExample:
    """The paper's distilled dataset: each root's targets are the verifier's own greedy continuation of its prefix."""
    roots = loss_mask(example, end_ids)
    targets = distilled_targets(
        verifier, example.input_ids.to(verifier.device), roots.to(verifier.device), depths, tuple(end_ids)
    )
    return RootExample(example.input_ids, roots.nonzero()[:, 0], targets.cpu())
