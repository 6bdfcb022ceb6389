"""Corrections of vLLM 0.32.0's rejection sampler on CPUs, where its fall-backs for GPU kernels sample from other laws.

Nothing is changed on another platform or in another version. Each has a test that fails without it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.vllm.compatibility import TESTED, installed_version


def apply() -> bool:
    """Make the corrections where they are needed; whether they are."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu() or (installed_version() or "").partition("+")[0] != TESTED:
        return False
    for name, ours in FIXES.items():
        theirs = getattr(rejection_sampler, name)
        if not isinstance(theirs, Corrected):
            setattr(rejection_sampler, name, Corrected(theirs, ours))
    return True


class Corrected:
    """Calls ``ours`` with a function of theirs, in whose place it stands and whose other attributes stay reachable."""

    def __init__(self, theirs: Any, ours: Callable[..., Any]) -> None:
        self._theirs = self.__wrapped__ = theirs  # the latter so that its parameters are seen
        self._ours = ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ours(self._theirs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def expand(
    _: Any, x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:  # (B,), (B,) -> (tokens,)
    """Each row's value for each of its draft tokens. Theirs writes to a copy, and leaves the result uninitialized."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)


def constrain(theirs: Any, logits: Tensor, *others: Any) -> Tensor:
    """Theirs fails where a top-k is set in a step without a draft token."""
    return theirs(logits, *others) if len(logits) else logits


def sample(
    theirs: Any, output: Tensor, cu_num: Tensor, drafted: Tensor, laws: Tensor | None, targets: Tensor, *others: Any
) -> Any:
    """Theirs takes the id -1, which stands for a draft that is to be rejected, for a token."""
    padding = drafted < 0
    if padding.any():  # a token that the verifier never draws is rejected
        drafted, targets = drafted.masked_fill(padding, 0), targets.clone()
        targets[padding, 0] = 0
    return theirs(output, cu_num, drafted, laws, targets, *others)


FIXES: dict[str, Callable[..., Any]] = {
    "expand_batch_to_tokens": expand,
    "apply_sampling_constraints": constrain,
    "_rejection_random_sample": sample,
}
