"""What turns of vLLM's engines say: equality, predicted acceptance, and a table of both beside the speed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.bench.serving import SYNCHRONOUS, Record, Request, Turn, Work, engine_arms
from recurrent_drafter.bench.summary import Ratio, figure, ratio
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk, median_interval, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier


def turns_of(records: Sequence[Record]) -> dict[str, list[Turn]]:
    """The turns of each arm, by the number of their work."""
    found: dict[str, list[Turn]] = {}
    for record in sorted((r for r in records if r["kind"] == "turn"), key=lambda record: record["number"]):
        turn = Turn([Request(**request) for request in record["requests"]], record["seconds"])
        found.setdefault(record["arm"], []).append(turn)
    return found


def judged(
    records: Sequence[Record], works: Sequence[Work], verifier: Verifier, drafter: RecurrentDrafter, length: int
) -> Iterator[Record]:
    """Greedy output compared with the base's, and the acceptance that the walk along the base's replies predicts.

    When sampling the outputs are of one law only. The walk still predicts: a draft token is accepted where the
    verifier draws that very token.
    """
    turns = turns_of(records)
    prompts = [torch.tensor(prompt) for work in works for prompt in work.prompts]
    replies = {name: [r.tokens for turn in own for r in turn.requests] for name, own in turns.items()}
    base = replies[SYNCHRONOUS]
    if works[0].temperature == 0:
        for name, found in replies.items():
            pairs = zip(prompts, base, found, strict=True)
            differences = [first_divergence(verifier, prompt, own, other) for prompt, own, other in pairs]
            bugs = [f"prompt {n}, {d.verdict}" for n, d in enumerate(differences) if d is not None and not d.is_tie]
            ties = sum(d is not None and d.is_tie for d in differences)
            yield {"kind": "equality", "arm": name, "ties": ties, "bugs": bugs}
    held_out = HeldOutReplies(verifier, [Reply(p, torch.tensor(r)) for p, r in zip(prompts, base, strict=True)])
    for arm in engine_arms(length):
        if arm.name in turns and arm.width is not None:
            predicted = chain_tokens_per_step(held_out, drafter, arm.width, length)
            yield {"kind": "predicted", "arm": arm.name, "tokens_per_step": predicted}


@torch.inference_mode()
def chain_tokens_per_step(held_out: HeldOutReplies, drafter: RecurrentDrafter, width: int, length: int) -> float:
    """What decoding of these replies yields where of each step's beams only the best is verified."""
    total = Walk(0, 0)
    draft = BeamDrafter(drafter, held_out.verifier.embed)
    for tokens, hiddens in held_out.pairs():
        root = tokens.to(hiddens.device)
        tree = prefix_tree(root, best_beam(draft(hiddens, root, width, length)), length + 1)
        total += walk(accepted_along(tokens, tree).n_accepted.tolist())
    return total.tokens_per_step


def best_beam(beams: Beams) -> Beams:
    """The most probable beam of full length alone, as one that was searched with width 1.

    >>> beams = Beams(torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[0, 0], [1, 0]]]), torch.zeros(1, 2, 2))
    >>> best_beam(beams).tokens.tolist()
    [[[6], [7]]]
    """
    tokens: Tensor = beams.paths[:, 0, :, None]  # (B, L, 1)
    return Beams(tokens, torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device))


@dataclass(frozen=True)
class ServingRow:
    """One arm at one concurrency and temperature. Milliseconds are means over the requests; None: does not apply."""

    concurrency: int
    temperature: float
    arm: str
    rate: float
    over_base: Ratio | None
    first: float
    between: float
    accepted_length: float | None
    predicted: float | None
    equality: str


def serving_rows(records: Sequence[Record]) -> list[ServingRow]:
    """A row for each arm of a file."""
    cell, *_ = records
    turns = turns_of(records)
    predicted = {r["arm"]: r["tokens_per_step"] for r in records if r["kind"] == "predicted"}
    equality = {r["arm"]: r for r in records if r["kind"] == "equality"}
    rows = []
    for name, own in turns.items():
        requests = [request for turn in own for request in turn.requests]
        ratios = [turn.rate / base.rate for turn, base in zip(own, turns[SYNCHRONOUS], strict=True)]
        drafts = sum(request.drafts for request in requests)
        rows.append(
            ServingRow(
                cell["concurrency"],
                cell["temperature"],
                name,
                float(np.median([turn.rate for turn in own])),
                None if name == SYNCHRONOUS else (float(np.median(ratios)), *median_interval(ratios)),
                1e3 * float(np.mean([request.first for request in requests])),
                1e3 * float(np.mean([request.between for request in requests])),
                1 + sum(request.accepted for request in requests) / drafts if drafts else None,
                predicted.get(name),
                "" if name == SYNCHRONOUS else _in_words(equality.get(name)),
            )
        )
    return rows


def _in_words(judgement: Record | None) -> str:
    if judgement is None:
        return "same law"
    if judgement["bugs"]:
        return f"NO: {len(judgement['bugs'])}"
    return f"ties: {judgement['ties']}" if judgement["ties"] else "yes"


SERVING_COLUMNS: dict[str, Callable[[ServingRow], str]] = {
    "concurrency": lambda row: str(row.concurrency),
    "temperature": lambda row: f"{row.temperature:g}",
    "engine": lambda row: row.arm,
    "tokens/s": lambda row: f"{row.rate:.1f}",
    "vs no speculation": lambda row: ratio(row.over_base),
    "first token, ms": lambda row: f"{row.first:.0f}",
    "between tokens, ms": lambda row: f"{row.between:.2f}",
    "accepted length": lambda row: figure(row.accepted_length),
    "predicted": lambda row: figure(row.predicted),
    "identical": lambda row: row.equality,
}
