"""Sampling as an argmax over noise that depends on (seed, row, position, token) alone (layer 1: tensor functions).

The argmax of log p + Gumbel noise is a draw from p. Here the noise of a token is a hash of the seed, the sequence's id,
the position in its reply and the token's id: nothing that a tree, a batch or an order of rows could change. So the same
seed gives the same tokens with speculation on or off.
"""

import torch
from torch import Tensor

# The generator is SplitMix64 (Steele, Lea & Flood 2014): a counter times _STEP through a mixing function. Its constants
# stand here as signed 64-bit numbers, for torch multiplies int64 modulo 2^64.
_STEP = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def gumbel_noise(seed: int, row_ids: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for int64 tensors that broadcast; the same wherever the four numbers are.

    >>> import torch
    >>> row, position = torch.tensor([3]), torch.tensor([7])
    >>> both = gumbel_noise(1, row, position, torch.tensor([10, 11]))
    >>> bool(both[1] == gumbel_noise(1, row, position, torch.tensor([11]))[0])
    True
    """
    key = _mix(torch.full_like(row_ids, signed_64(seed)) + row_ids * _STEP)
    key = _mix(key + positions * _STEP)
    bits = _shift(_mix(key + tokens * _STEP), 11)  # 53 of them, as many as a float64 holds
    uniform = (bits.double() + 0.5) * 2.0**-53  # within (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


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
    if scores.device.type == "cpu":
        tokens = (scores != -torch.inf).any(0).nonzero()[:, 0]  # NaN stays, to be found
    if not len(tokens):
        raise ValueError("the logits processors leave no token to draw: expected a finite score for one at least")
    noise = gumbel_noise(seed, row_ids[:, None], positions[:, None], tokens)
    return tokens[(scores[:, tokens].double() + noise).argmax(1)]
