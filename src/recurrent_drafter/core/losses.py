"""Losses over selected roots.

The head's logits are what costs memory: V numbers for every root and depth. `chunked_loss` never holds more than a
chunk of them, and computes each chunk's gradient along with its loss, so nothing is computed twice either.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100  # a target that does not count

# (logits (c, K, D), which roots they are of) -> loss ()
ChunkLoss = Callable[[Tensor, slice], Tensor]


def draft_labels(targets: Tensor, draft_ids: Tensor, vocab_size: int) -> Tensor:  # (P, K), (D,) -> (P, K)
    """The draft vocabulary's numbers of target tokens; `IGNORED` where it does not hold them."""
    index = torch.full((vocab_size,), IGNORED, device=draft_ids.device)
    index[draft_ids] = torch.arange(len(draft_ids), device=draft_ids.device)
    return index[targets.clamp(min=0)].masked_fill(targets == IGNORED, IGNORED)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:  # (P, K, D), (P, K) -> (K,)
    """Summed over the roots, one number per depth, in float32; `IGNORED` targets count nothing."""
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(targets).sum(0)


def divergence(
    logits: Tensor, teacher: Tensor, counted: Tensor, temperature: float
) -> Tensor:  # (P, K, D), (P, K, D), (P, K) -> (K,)
    """T^2 KL(teacher || student) of laws softened by T, where ``counted``; as `cross_entropy`, in float32."""
    student = (logits.float() / temperature).log_softmax(-1)
    law = (teacher.float() / temperature).log_softmax(-1)
    losses = functional.kl_div(student, law, reduction="none", log_target=True).sum(-1)
    return temperature**2 * losses.masked_fill(~counted, 0.0).sum(0)


def depth_weights(counts: Tensor, gamma: float) -> Tensor:  # (K,) -> (K,)
    """Factor of each depth's sum: its mean weighs gamma^k, and the weights sum to 1; empty depths have none."""
    weights = gamma ** torch.arange(counts.shape[0], device=counts.device) * (counts > 0)
    return weights / weights.sum().clamp(min=1e-9) / counts.clamp(min=1)


def chunked_loss(exits: Tensor, head: Tensor, loss: ChunkLoss, chunk: int) -> Tensor:  # (P, K, E), (D, E) -> ()
    """Sum of ``loss``, a chunk's share with every weight in it, over chunks of so many roots.

    ``exits`` are what the ``head``, given by its weight, reads. Logits exist one chunk at a time.
    """
    total: Tensor = _ChunkedLoss.apply(exits, head, loss, chunk)  # type: ignore[no-untyped-call]
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exits: Tensor, head: Tensor, loss: ChunkLoss, chunk: int) -> Tensor:
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = exits.new_zeros((), dtype=torch.float32)
        exits_grad = torch.zeros_like(exits) if learns else exits
        head_grad = torch.zeros_like(head) if learns else head
        for start in range(0, exits.shape[0], chunk):
            rows = slice(start, min(start + chunk, exits.shape[0]))
            with torch.set_grad_enabled(learns):
                leaves = [exits[rows].detach().requires_grad_(learns), head.detach().requires_grad_(learns)]
                part = loss(functional.linear(*leaves), rows)
            total += part.detach()
            if learns:
                exits_grad[rows], grad = torch.autograd.grad(part, leaves)
                head_grad += grad
        ctx.gradients = exits_grad, head_grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        exits_grad, head_grad = ctx.gradients
        ctx.gradients = None  # scaled in place, so good for once
        return exits_grad.mul_(grads[0]), head_grad.mul_(grads[0]), None, None
