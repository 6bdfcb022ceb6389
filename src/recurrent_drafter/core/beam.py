"""Beam search over the drafter.

The running example of this package: three beams of two tokens after the root ``red``, of ``Mars is a red ...``::

    red --- planet --- and
        |          `-- with
        `-- dot ------ in
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (draft tokens (B, W), by their number in the draft vocabulary; state (B, W, H); None and None at the root)
# -> (log-probabilities (B, W, D), state (B, W, H)), at the root W = 1
DraftStep = Callable[[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
# cumulative log-probabilities (B, W) of the level just drafted -> whether to draft one more
Deeper = Callable[[Tensor], bool]


@dataclass(frozen=True)
class Beams:
    """The W best beams of every length 1 .. L: the lattice that a beam search walks through.

    Slot w of level i is the beam of i + 1 tokens that ends in ``tokens[:, i, w]`` and continues slot
    ``parents[:, i, w]`` of level i - 1 (at level 0: the root, parent 0). ``log_probs`` are cumulative, float32.
    """

    tokens: Tensor  # (B, L, W) int64
    parents: Tensor  # (B, L, W) int64
    log_probs: Tensor  # (B, L, W) float32

    @property
    def paths(self) -> Tensor:  # (B, W, L)
        """The tokens of the W beams of full length, the paper's candidates."""
        _, length, _ = self.tokens.shape
        slot = torch.arange(self.tokens.shape[2], device=self.tokens.device).expand_as(self.tokens[:, 0])
        columns = []
        for level in reversed(range(length)):
            columns.append(self.tokens[:, level].gather(1, slot))
            slot = self.parents[:, level].gather(1, slot)
        return torch.stack(columns[::-1], dim=2)


def beam_search(step: DraftStep, draft_ids: Tensor, width: int, length: int, deeper: Deeper | None = None) -> Beams:
    """W beams by cumulative log-probability, L steps; whatever the drafter says is what is used, no hidden top-k.

    Args:
        draft_ids: (D,), the verifier's id of each draft token.
        width: W, at most D.
        deeper: asked after each level but the last; where it says no, the beams are as long as they are by then.
    """
    vocabulary = draft_ids.shape[0]
    if width > vocabulary:
        raise ValueError(f"beam_width is {width}, expected at most {vocabulary} (the draft vocabulary)")
    token, state, score = None, None, None
    levels = []
    for _ in range(length):
        log_probs, state = step(token, state)  # (B, w, D), (B, w, H)
        candidates = log_probs if score is None else log_probs + score[:, :, None]
        score, index = candidates.flatten(1).topk(width, dim=1)  # (B, W)
        parent = torch.div(index, vocabulary, rounding_mode="floor")
        token = index - parent * vocabulary
        state = state.gather(1, parent[:, :, None].expand(-1, -1, state.shape[2]))
        levels.append((token, parent, score))
        if deeper is not None and len(levels) < length and not deeper(score):
            break
    tokens, parents, scores = (torch.stack(column, dim=1) for column in zip(*levels, strict=True))
    scores = scores.masked_fill(scores.isnan(), -torch.inf)  # a damaged drafter's: such a beam is worth nothing
    return Beams(draft_ids[tokens], parents, scores)


def sampled_chain(
    step: DraftStep, draft_ids: Tensor, length: int, temperature: Tensor, draw: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One chain of L tokens for each row, every token drawn from the drafter's distribution at the row's temperature.

    Args:
        draft_ids: (D,), the verifier's id of each draft token.
        temperature: (B,); at 0 a row takes the likeliest token.
        draw: maps probabilities (B, D) to one index per row (B,).

    Returns:
        The tokens (B, L), as the verifier's ids, and the distributions (B, L, D) that they were drawn from.
    """
    greedy = (temperature <= 0)[:, None]
    divisor = temperature.masked_fill(greedy[:, 0], 1)[:, None]
    token, state = None, None
    tokens, laws = [], []
    for _ in range(length):
        log_probs, state = step(token, state)  # (B, 1, D), (B, 1, H)
        law = (log_probs[:, 0] / divisor).softmax(-1)
        likeliest = torch.zeros_like(law).scatter_(1, log_probs[:, 0].argmax(-1, keepdim=True), 1.0)
        law = torch.where(greedy, likeliest, law)
        token = draw(law)[:, None]
        tokens.append(draft_ids[token[:, 0]])
        laws.append(law)
    return torch.stack(tokens, 1), torch.stack(laws, 1)
