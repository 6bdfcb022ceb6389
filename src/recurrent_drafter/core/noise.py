"""Sampling as an argmax over noise that depends on (seed, row, position, token) alone.

The argmax of log p + Gumbel noise is a draw from p. Here the noise of a token is a hash of the seed, the sequence's id,
the position in its reply and the token's id: nothing that a tree, a batch or an order of rows could change. So the same
seed gives the same tokens with speculation on or off.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = TypeVar("Words", Tensor, npt.NDArray[np.int64])  # of int64, whose products wrap modulo 2^64 in both

# The generator is SplitMix64 (Steele, Lea & Flood 2014): a counter times _STEP through a mixing function. Its constants
# stand here as signed 64-bit numbers, for torch has no arithmetic of unsigned ones.
_STEP = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift(x: Words, bits: int) -> Words:
    """Logical shift to the right; that of signed numbers carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Words) -> Words:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _hash(seed: int, row_ids: Words, positions: Words, tokens: Words) -> Words:
    """53 bits, as many as a float64 holds."""
    key = _mix(row_ids * _STEP + signed_64(seed))
    key = _mix(key + positions * _STEP)
    return _shift(_mix(key + tokens * _STEP), 11)


def gumbel_noise(seed: int, row_ids: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for int64 tensors that broadcast; the same wherever the four numbers are.

    >>> import torch
    >>> row, position = torch.tensor([3]), torch.tensor([7])
    >>> both = gumbel_noise(1, row, position, torch.tensor([10, 11]))
    >>> bool(both[1] == gumbel_noise(1, row, position, torch.tensor([11]))[0])
    True
    """
    if tokens.device.type == "cpu":  # where numpy runs these many small operations in a third of torch's time
        bits = torch.from_numpy(_hash(seed, row_ids.numpy(), positions.numpy(), tokens.numpy()))
    else:
        bits = _hash(seed, row_ids, positions, tokens)
    uniform = bits.double().add_(0.5).mul_(2.0**-53)  # within (0, 1), both ends excluded
    return uniform.log_().neg_().log_().neg_()


def signed_64(number: int) -> int:
    """A Python integer as the int64 of the same low 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def draw_tokens(scores: Tensor, seed: int, row_ids: Tensor, positions: Tensor) -> Tensor:  # (B, V), (B,), (B,)
    """One token per row (B,), with probability softmax(scores); scores of -inf are never drawn.

    On a CPU noise is made only for tokens that survived top-k and the like; a GPU makes it for all, which costs less
    there than asking which survived.
    """
    tokens = torch.arange(scores.shape[1], device=scores.device)
    row_ids, positions = row_ids[:, None], positions[:, None]
    if scores.device.type == "cpu" and scores.min() == -torch.inf:
        tokens = (scores != -torch.inf).any(0).nonzero()[:, 0]  # NaN stays, to be found
        if not len(tokens):
            raise ValueError("the logits processors leave no token to draw: expected a finite score for one at least")
        scores = scores[:, tokens]
    return tokens[gumbel_noise(seed, row_ids, positions, tokens).add_(scores).argmax(1)]
