"""Is it a tie or a bug? Outputs compared, and their first divergence explained."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from recurrent_drafter.core.noise import gumbel_noise
from recurrent_drafter.core.tree import DraftTree, root_tree
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.hashes import saved_fingerprint

TIE_CAPS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
VERIFICATION_FILE = "verify.json"  # the last verification of a drafter, beside it
NOTHING = -1  # in the place of a token where a reply has ended


@dataclass(frozen=True)
class Divergence:
    """Where two replies to one prompt first differ, and whether rounding explains it.

    ``margin`` is the distance of the two tokens' scores in a one-row pass: log-probabilities as the processors leave
    them, with their noise when sampling. ``tolerance`` is twice the largest difference between the log-probabilities of
    that pass and a tree pass at this place, capped by dtype.
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
    verifier: Verifier, prompt: Tensor, expected: Sequence[int], found: Sequence[int], draw: Draw | None = None
) -> Divergence | None:
    """The first difference of two replies to ``prompt`` (S,); None when they are equal. Greedy unless ``draw`` says."""
    if list(expected) == list(found):
        return None
    position = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    if position is None:  # one is the beginning of the other: no rounding explains that
        shorter = min(len(expected), len(found))
        beyond = [reply[shorter] if len(reply) > shorter else NOTHING for reply in (expected, found)]
        return Divergence(shorter, beyond[0], beyond[1], float("inf"), 0.0)
    reply, pair = expected[:position], (expected[position], found[position])
    draw = draw or Draw(prompt)
    text = torch.cat([prompt.cpu(), torch.tensor(reply, dtype=torch.int64)]).to(verifier.device)
    with torch.inference_mode():
        one_row = _last_logits(verifier, text, nodes=1)
        with PackedLinears(verifier.model).applied():  # as the loop computes it
            tree = _last_logits(verifier, text, nodes=16)
        own, other = draw.scores(reply, one_row), draw.scores(reply, tree)
        both = own.isfinite() & other.isfinite()
        moved = (one_row.float().log_softmax(-1) - tree.float().log_softmax(-1))[list(pair)].abs()
        measured = max(float((own - other)[both].abs().max()), float(moved.max()))
        tolerance = min(2 * measured, TIE_CAPS[verifier.model.dtype])
        lifted = one_row.clone()
        lifted[[token for token in pair if own[token] == -torch.inf]] += tolerance
        passes = ((own, 0.0), (other, float(moved.max())), (draw.scores(reply, lifted), tolerance))
        margin = _margin(draw, position, passes, torch.tensor(pair, device=verifier.device))
    return Divergence(position, *pair, margin, tolerance)


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


def _last_logits(verifier: Verifier, text: Tensor, nodes: int) -> Tensor:  # (S,) -> (V,)
    """Logits after the text, its last token verified as the root of a tree of ``nodes``."""
    session, _ = verifier.open(text[None, :-1], None, len(text) + nodes)
    root = text[-1:]
    tree = root_tree(root)
    if nodes > 1:
        zeros = torch.zeros(1, nodes, dtype=torch.int64, device=text.device)
        depths = zeros.clone()
        depths[:, 1:] = 1
        tree = DraftTree(root.expand(1, nodes), zeros, depths, zeros.float(), max_depth=1)
    return session.forward_tree(tree).logits[0, 0]


Replies = list[list[int]]
# prompts (B, S), attention mask (B, S), each row's id -> replies without what stands behind their end
GenerateBatch = Callable[[Tensor, Tensor, list[int]], Replies]


@dataclass(frozen=True)
class Comparison:
    """One prompt's replies by two ways of decoding, the first of which is the reference."""

    prompt: int
    reference: str
    candidate: str
    divergence: Divergence | None

    @property
    def kind(self) -> str:
        """``identical``, ``tie`` or ``BUG``."""
        if self.divergence is None:
            return "identical"
        return "tie" if self.divergence.is_tie else "BUG"


def compare_batch(
    verifier: Verifier,
    arms: dict[str, GenerateBatch],
    references: Sequence[str],
    batch: tuple[Tensor, Tensor],
    row_ids: list[int],
    draw: Callable[[int], Draw],
) -> list[Comparison]:
    """Decode left-padded prompts and their mask (B, S) in every way, and compare each with the references before it.

    ``row_ids`` are the prompts' numbers; ``draw`` tells of a row (of the batch) how its tokens are drawn.
    """
    input_ids, attention_mask = batch
    pairs = [pair for pair in itertools.combinations(arms, 2) if pair[0] in references]
    replies = {name: generate(input_ids, attention_mask, row_ids) for name, generate in arms.items()}
    found = []
    for row, number in enumerate(row_ids):
        prompt = input_ids[row][attention_mask[row].bool()]
        for reference, candidate in pairs:
            difference = first_divergence(verifier, prompt, replies[reference][row], replies[candidate][row], draw(row))
            found.append(Comparison(number, reference, candidate, difference))
    return found


def processors_of(
    verifier: Verifier, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]
) -> tuple[LogitsProcessor, ...]:
    """The processors that transformers would generate from these prompts with."""

    def method(model: Any, input_ids: Tensor, logits_processor: Any, **_: Any) -> Any:  # noqa: ARG001
        return tuple(logits_processor)

    generate: Any = verifier.model.generate
    processors: tuple[LogitsProcessor, ...] = generate(
        input_ids=input_ids, attention_mask=attention_mask, custom_generate=method, **options
    )
    return processors


def until_end(reply: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """A reply up to its first end token, without the padding behind it."""
    ends = [place for place, token in enumerate(reply) if token in end_ids]
    return list(reply[: ends[0] + 1] if ends else reply)


def read_verification(folder: Path) -> dict[str, Any]:
    """What was left of the last verification of the drafter in a folder. Raises ValueError unless it was passed.

    It counts only for the config and the weights that were verified.
    """
    again = f"run recurrent-drafter verify --base_model MODEL --speculator_path {folder}"
    path = folder / VERIFICATION_FILE
    if not path.is_file():
        raise ValueError(f"the drafter at {folder} was never verified: {again}")
    try:
        record = json.loads(path.read_text())
        of, bugs = record["drafter"], int(record["bugs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): {again}") from None
    if of != saved_fingerprint(folder):
        raise ValueError(f"{path} is of other weights or another config than the drafter has now: {again}")
    if bugs:
        raise ValueError(f"the last verification of the drafter at {folder} found {bugs} bugs: {again}")
    verified: dict[str, Any] = record
    return verified
