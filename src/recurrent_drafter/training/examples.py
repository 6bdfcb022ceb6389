"""Training rows: the roots of a text and the targets of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.records.provenance import hash_of, hash_of_tensors


@dataclass(frozen=True)
class RootExample:
    """A text (S,), the positions of its roots (P,) and the K targets of each root (P, K), `IGNORED` where none.

    ``number`` is its place in a training set, for messages.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    number: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)


def loss_mask(example: TrainExample, end_ids: Sequence[int]) -> Tensor:  # (S,) bool
    """Which positions are roots: tokens the verifier would have to generate, but not an end token, nor the first."""
    mask = (example.span_ids >= 0) & ~torch.isin(example.input_ids, torch.tensor(list(end_ids)))
    mask[0] = False  # nothing precedes it, so no hidden state predicted it
    return mask


def with_text_targets(example: TrainExample, depths: int, end_ids: Sequence[int]) -> RootExample:
    """Ground truth: each root's targets are the text that follows it, within its span and up to an end token."""
    ids, spans = example.input_ids, example.span_ids
    positions = loss_mask(example, end_ids).nonzero()[:, 0]
    ahead = positions[:, None] + torch.arange(1, depths + 1, device=ids.device)  # (P, K)
    inside = ahead < len(ids)
    ahead = ahead.clamp(max=len(ids) - 1)
    inside &= spans[ahead] == spans[positions, None]
    targets = ids[ahead].masked_fill(~inside, IGNORED)
    return RootExample(ids, positions, cut_after_end(targets, tuple(end_ids)))


def cut_after_end(targets: Tensor, end_ids: tuple[int, ...]) -> Tensor:  # (P, K) -> (P, K)
    """Targets with `IGNORED` after the first end token, which itself counts."""
    ends = torch.isin(targets, targets.new_tensor(end_ids)).int()
    return targets.masked_fill(ends.cumsum(1) > ends, IGNORED)


def frequent_tokens(examples: Sequence[RootExample], size: int, vocab_size: int, always: Sequence[int]) -> Tensor:
    """The ``size`` most frequent target tokens (D,), ascending; ``always`` (the end tokens) are in it."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in examples:
        counts += torch.bincount(example.targets[example.targets != IGNORED], minlength=vocab_size)
    counts[list(always)] = counts.sum() + 1
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(examples: Sequence[RootExample], draft_ids: Tensor) -> float:
    """The share of target tokens that the draft vocabulary holds."""
    inside = sum(int(torch.isin(example.targets, draft_ids).sum()) for example in examples)
    return inside / max(sum(int((example.targets != IGNORED).sum()) for example in examples), 1)


def collate(examples: Sequence[RootExample]) -> dict[str, Tensor]:
    """Right-padded texts (B, S) with their numbers, and all roots in one list: rows, positions (P,), targets (P, K)."""
    texts = [example.input_ids for example in examples]
    return {
        "input_ids": pad_sequence(texts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
        "rows": torch.cat([torch.full_like(example.positions, row) for row, example in enumerate(examples)]),
        "positions": torch.cat([example.positions for example in examples]),
        "targets": torch.cat([example.targets for example in examples]),
        "numbers": torch.tensor([example.number for example in examples]),
    }


def run_fingerprint(verifier: str, examples: Sequence[RootExample], settings: Mapping[str, Any]) -> str:
    """Of what makes a training the same: a `verifier_fingerprint`, all examples with their targets, settings."""
    data = hash_of_tensors(tensor for e in examples for tensor in (e.input_ids, e.positions, e.targets))
    return hash_of({"verifier": verifier, "data": data, "settings": dict(settings)})
