"""Is it a tie or a bug? Two outputs compared, and their first divergence explained (layer 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafter.tree import DraftTree, root_tree
from recurrent_drafter.verifier import Verifier

# Log-probabilities (V,) and a position in the reply to the scores (V,) whose largest was drawn.
Scores = Callable[[Tensor, int], Tensor]

TIE_CAPS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}


@dataclass(frozen=True)
class Divergence:
    """Where two replies to one prompt first differ, and whether rounding explains it.

    ``margin`` is the distance of the two tokens' log-probabilities in a one-row pass; ``tolerance`` is twice the
    largest difference between that pass and a tree pass at this place, capped by dtype.
    """

    position: int
    expected: int
    found: int
    margin: float
    tolerance: float

    @property
    def is_tie(self) -> bool:
        """A numeric tie; anything else is a bug."""
        return self.margin <= self.tolerance


def first_divergence(
    verifier: Verifier, prompt: Tensor, expected: Sequence[int], found: Sequence[int], scores: Scores | None = None
) -> Divergence | None:
    """The first difference of two replies to ``prompt`` (S,); None when they are equal.

    ``scores`` are what was compared at a draw, when sampling: warped and noised. By default log-probabilities.
    """
    if list(expected) == list(found):
        return None
    position = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if position is None:  # one is the beginning of the other: no rounding explains that
        shorter = min(len(expected), len(found))
        return Divergence(shorter, -1, -1, float("inf"), 0.0)
    text = torch.cat([prompt, prompt.new_tensor(expected[:position])]).to(verifier.device)
    with torch.inference_mode():
        one_row = _last_log_probs(verifier, text, nodes=1)
        tree = _last_log_probs(verifier, text, nodes=16)
        if scores is not None:
            one_row, tree = scores(one_row, position), scores(tree, position)
    measured = float((one_row - tree).abs().max())
    margin = float((one_row[expected[position]] - one_row[found[position]]).abs())
    tolerance = min(2 * measured, TIE_CAPS[verifier.model.dtype])
    return Divergence(position, expected[position], found[position], margin, tolerance)


def _last_log_probs(verifier: Verifier, text: Tensor, nodes: int) -> Tensor:  # (S,) -> (V,)
    """Log-probabilities after the text, its last token verified as the root of a tree of ``nodes``."""
    session, _ = verifier.open(text[None, :-1], None, len(text) + nodes)
    root = text[-1:]
    tree = root_tree(root)
    if nodes > 1:
        zeros = torch.zeros(1, nodes, dtype=torch.int64, device=text.device)
        depths = zeros.clone()
        depths[:, 1:] = 1
        tree = DraftTree(root.expand(1, nodes), zeros, depths, zeros.float(), max_depth=1)
    return session.forward_tree(tree).logits[0, 0].float().log_softmax(-1)
