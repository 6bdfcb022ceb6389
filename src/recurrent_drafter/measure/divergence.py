"""Is it a tie or a bug? Outputs compared, and their first divergence explained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from recurrent_drafter.core.noise import gumbel_noise
from recurrent_drafter.core.tree import DraftTree, root_tree
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.packed_linear import PackedLinears, unpacked
from recurrent_drafter.models.verifier import Verifier

TIE_CAPS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
NOTHING = -1  # in the place of a token where a reply has ended
TREES = 4, 16  # nodes of the trees that a reply is read again in, to see how far ways of computing differ


@dataclass(frozen=True)
class Divergence:
    """Where two replies to one prompt first differ, and whether rounding explains it.

    ``margin`` is the distance of the two tokens' scores in a one-row pass: log-probabilities as the processors leave
    them, with their noise when sampling. ``tolerance`` is twice the largest difference between the log-probabilities
    that the reply's tokens give at this place when they are read row by row and in trees, capped by dtype.
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

    @property
    def verdict(self) -> str:
        """In words, with the margin and what is allowed."""
        if self.is_tie:
            return f"numeric tie (margin {self.margin:.2g} < {self.tolerance:.2g})"
        return f"BUG (margin {self.margin:.2g}, a tie has at most {self.tolerance:.2g})"


@dataclass(frozen=True)
class Draw:
    """How the tokens of a reply were drawn: by these processors, and with this noise when sampling (else no ``seed``).

    ``prompt`` (S,) is what the processors saw, pads included.
    """

    prompt: Tensor
    processors: Sequence[LogitsProcessor] = ()
    seed: int | None = None
    row_id: int = 0

    def scores(self, reply: Sequence[int], logits: Tensor) -> Tensor:  # (V,) -> (V,)
        """Log-probabilities after ``reply`` as the processors leave them."""
        prompt = self.prompt.to(logits.device)
        state = GenerationState(prompt[None], len(reply) + 1)
        state.generated[0] = list(reply)
        root = torch.zeros(1, dtype=torch.int64, device=logits.device)
        sampler = Sampler(state, self.processors)
        return sampler.processed(logits[None].float(), root_tree(root), root)[0].log_softmax(-1)

    def noised(self, position: int, scores: Tensor, tokens: Tensor) -> list[float]:  # (V,), (n,) -> n
        """What the tokens compete with for this position of the reply."""
        competing = scores[tokens].double()
        if self.seed is not None:
            place = torch.tensor([position], device=tokens.device)
            competing += gumbel_noise(self.seed, torch.full_like(place, self.row_id), place, tokens)
        return [float(score) for score in competing]


def first_divergence(
    verifier: Verifier,
    prompt: Tensor,
    expected: Sequence[int],
    found: Sequence[int],
    draw: Draw | None = None,
    ways: Callable[[tuple[int, ...]], list[Tensor]] | None = None,
) -> Divergence | None:
    """The first difference of two replies to ``prompt`` (S,); None when they are equal. Greedy unless ``draw`` says.

    ``ways`` gives what `ways_of_computing` does of this prompt, for a caller that keeps it.
    """
    if list(expected) == list(found):
        return None
    position = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if position is None:  # one is the beginning of the other: no rounding explains that
        shorter = min(len(expected), len(found))
        beyond = [reply[shorter] if len(reply) > shorter else NOTHING for reply in (expected, found)]
        return Divergence(shorter, beyond[0], beyond[1], float("inf"), 0.0)
    reply, pair = expected[:position], (expected[position], found[position])
    draw = draw or Draw(prompt)
    one_row, *trees = ways(tuple(reply)) if ways else ways_of_computing(verifier, prompt, reply)
    own, others = draw.scores(reply, one_row), [draw.scores(reply, tree) for tree in trees]
    moved = [_difference(*(way.float().log_softmax(-1)[list(pair)] for way in (one_row, tree))) for tree in trees]
    measured = max(*(_difference(own, other) for other in others), *moved)
    tolerance = min(2 * measured, TIE_CAPS[verifier.model.dtype])
    lifted = one_row.clone()
    lifted[[token for token in pair if own[token] == -torch.inf]] += tolerance
    passes = [(own, 0.0), *zip(others, moved, strict=True), (draw.scores(reply, lifted), tolerance)]
    margin = _margin(draw, position, passes, torch.tensor(pair, device=one_row.device))
    return Divergence(position, *pair, margin, tolerance)


def _difference(own: Tensor, other: Tensor) -> float:  # (n,), (n,)
    """The largest, where both are finite."""
    both = own.isfinite() & other.isfinite()
    return float((own - other)[both].abs().max())


@torch.inference_mode()
def ways_of_computing(verifier: Verifier, prompt: Tensor, reply: Sequence[int]) -> list[Tensor]:  # (S,) -> each (V,)
    """Logits after ``reply``, computed as different arms do: a row at a time, then in trees of `TREES` nodes.

    What the cache holds differs between arms more than the last pass does, so the whole reply is read again, each token
    as the root of such a tree. Only the root is kept: a tree that is wrong below it changes nothing.
    """
    text = torch.cat([prompt.cpu(), torch.tensor(reply, dtype=torch.int64)]).to(verifier.device)
    count = max(len(reply), 1)
    with unpacked(verifier.model):  # as transformers computes
        found = [_replayed(verifier, text, count, nodes=1)]
    with PackedLinears(verifier.model).applied():  # as the loop computes
        return found + [_replayed(verifier, text, count, nodes) for nodes in TREES]


def _replayed(verifier: Verifier, text: Tensor, count: int, nodes: int) -> Tensor:  # (S,) -> (V,)
    """Logits after the text, each of its last ``count`` tokens verified as the root of a tree of ``nodes``."""
    session, _ = verifier.open(text[None, :-count], None, len(text) + nodes)
    for root in text[-count:].split(1):
        zeros = torch.zeros(1, nodes, dtype=torch.int64, device=text.device)
        depths = zeros.clone()
        depths[:, 1:] = 1
        tree = DraftTree(root.expand(1, nodes), zeros, depths, zeros.float(), zeros, max_depth=min(nodes - 1, 1))
        verified = session.forward_tree(tree)
        session.keep(zeros[:, :1], [0])
    return verified.logits[0, 0]


def _margin(draw: Draw, position: int, passes: Sequence[tuple[Tensor, float]], pair: Tensor) -> float:
    """How far the two tokens are from changing places.

    Top-k and the like may have cut one of them in the first of the ``passes``. Then the next counts that it survived,
    with how much was changed in that pass: the tie is one at the cut.
    """
    noised = [draw.noised(position, scores, pair) for scores, _ in passes]
    cut = [score == -torch.inf for score in noised[0]]
    if not any(cut):
        return abs(noised[0][0] - noised[0][1])
    if not all(cut):
        for (_, change), (expected, found) in zip(passes[1:], noised[1:], strict=True):
            lacking, winner = (found, expected) if cut[1] else (expected, found)
            if lacking > -torch.inf:
                return max(change, winner - lacking)
    return float("inf")


def processors_of(
    verifier: Verifier, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]
) -> tuple[LogitsProcessor, ...]:
    """The processors that transformers would generate from these prompts with."""

    def method(model: Any, input_ids: Tensor, logits_processor: Any, **_: Any) -> Any:  # noqa: ARG001
        return logits_processor

    generate: Any = verifier.model.generate
    return tuple(generate(input_ids=input_ids, attention_mask=attention_mask, custom_generate=method, **options))
