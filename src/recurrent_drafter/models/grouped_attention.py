"""Attention for query heads that share a key head (Llama 3, Qwen, Mistral, Gemma), without a copy of the keys.

Where there is a mask, and a tree always has one, transformers repeats keys and values for every query head that reads
them: at each pass the whole cache, several times over. Here the query heads of a group are rows of their key head::

    queries (B, G x Hk, N, d)  ->  (B, Hk, G x N, d), with the mask's N rows repeated G times

What this function does not know keeps the model's own path: soft caps, sinks, position biases, dropout, masks per head.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "recurrent_drafter_grouped"
# Of a whole text the repeated mask would outgrow the keys; torch's kernel for CPUs reads those of a group by itself.
FEW = range(1, 65)
MANY = 1024  # columns
KNOWN = {"dropout", "scaling", "is_causal", "position_ids", "use_cache", "sliding_window"}  # a mask tells of its window
_repeated = WeakTensorKeyDictionary()  # mask: its rows repeated; all layers of a pass get the same mask


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: (B, G x Hk, N, d), (B, Hk, columns, d) twice -> (B, N, G x Hk, d)."""
    if not _suits(query, key, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    (batch, heads, rows, width), scale = query.shape, options.get("scaling")
    group = heads // key.shape[1]
    attend = functional.scaled_dot_product_attention
    if rows not in FEW:
        whole = attend(query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True)
        return whole.transpose(1, 2).contiguous(), None
    folded = query.reshape(batch, -1, group * rows, width)
    mask = None if attention_mask is None else _repeat_to(group * rows, attention_mask)
    output = attend(folded, key, value, attn_mask=mask, scale=scale).unflatten(2, (group, rows))
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous(), None


def _suits(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    if query.shape[1] == key.shape[1] or options.get("dropout"):
        return False
    if any(value is not None for name, value in options.items() if name not in KNOWN):
        return False
    rows = query.shape[2]
    if mask is None:
        # More rows are a causal pass, whose keys transformers does not repeat; after few columns folding takes longer.
        return rows == 1 and key.shape[2] >= MANY
    return mask.dim() == 4 and mask.shape[1] == 1 and (rows in FEW or query.device.type == "cpu")


def _repeat_to(rows: int, mask: Tensor) -> Tensor:  # (B, 1, N, columns) -> (B, 1, rows, columns)
    if mask.shape[2] == 1:
        return mask.expand(-1, -1, rows, -1)
    known = _repeated.get(mask)
    if known is None or known.shape[2] != rows:
        known = _repeated[mask] = mask.repeat(1, 1, rows // mask.shape[2], 1)
    return known


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def finds_attention_by_name(model: PreTrainedModel) -> bool:
    """Whether the model's layers look up their attention by its name, and nothing else depends on the name."""
    files = {type(module).__module__ for module in model.modules() if getattr(module, "num_key_value_groups", 1) > 1}
    return bool(files) and model._supports_attention_backend and not any(map(_asks_for_name, files))


@cache
def _asks_for_name(file: str) -> bool:
    """Whether a model's code decides by its attention's name (transformers 5.19: sparse layers of DeepSeek 3.2)."""
    return re.search(r"_attn_implementation (==|!=|in|not in) ", inspect.getsource(sys.modules[file])) is not None


@contextmanager
def grouped(config: PreTrainedConfig) -> Iterator[None]:
    """Within it layers of this config attend by `grouped_attention` where theirs is sdpa; then it is theirs again."""
    own = config._attn_implementation
    if own != "sdpa":
        yield
        return
    # Past the property, which would set it in every part of the config, whatever each part has.
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own
