"""Corrections of vLLM 0.32.0's rejection sampler on CPUs, where its fall-backs for GPU kernels sample from other laws.

Nothing is changed on another platform or in another version. Each has a test that fails without it.
"""

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
    for name, fix in FIXES.items():
        theirs = getattr(rejection_sampler, name)
        if not isinstance(theirs, _Around):
            setattr(rejection_sampler, name, fix(theirs))
    return True


class _Around:
    """Stands in for a function of theirs, whose other attributes stay reachable."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = self.__wrapped__ = theirs  # the latter so that its parameters are seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


class _Expand(_Around):
    """Each row's value for each of its draft tokens. Theirs writes to a copy, and leaves the result uninitialized."""

    def __call__(
        self, x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:  # (B,), (B,) -> (tokens,)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = x.masked_fill(x == replace_from, replace_to)
        return values.repeat_interleave(counts, output_size=num_tokens)


class _Constraints(_Around):
    """Theirs fails where a top-k is set in a step without a draft token."""

    def __call__(self, logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any) -> Tensor:
        return self._theirs(logits, cu_num_draft_tokens, sampling_metadata) if len(logits) else logits


class _RandomSample(_Around):
    """Theirs takes the id -1, which stands for a draft that is to be rejected, for a token."""

    def __call__(
        self,
        output_token_ids: Tensor,
        cu_num_draft_tokens: Tensor,
        draft_token_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        *others: Any,
    ) -> Any:
        padding = draft_token_ids < 0
        if padding.any():  # a token that the verifier never draws is rejected
            draft_token_ids = draft_token_ids.masked_fill(padding, 0)
            target_probs = target_probs.clone()
            target_probs[padding, 0] = 0
        return self._theirs(output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, *others)


FIXES: dict[str, type[_Around]] = {
    "expand_batch_to_tokens": _Expand,
    "apply_sampling_constraints": _Constraints,
    "_rejection_random_sample": _RandomSample,
}
