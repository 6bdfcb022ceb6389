"""Losses over selected roots (layer 1: pure tensor functions)."""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # a target that does not count


def depth_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:  # (P, K, D), (P, K) -> (K,)
    """Cross-entropy summed over the roots, one number per depth, in float32; `IGNORED` targets count nothing."""
    _, depths, _ = logits.shape
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(-1, depths).sum(0)


def combine_depths(sums: Tensor, counts: Tensor, gamma: float) -> Tensor:  # (K,), (K,) -> ()
    """Mean loss per depth, weighted by gamma^k and divided by the weights' sum; empty depths have no weight."""
    weights = gamma ** torch.arange(sums.shape[0], device=sums.device) * (counts > 0)
    return (weights * sums / counts.clamp(min=1)).sum() / weights.sum().clamp(min=1e-9)
