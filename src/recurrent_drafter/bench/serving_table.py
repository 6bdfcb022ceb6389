"""What turns of vLLM's engines say: equality, predicted acceptance, and a table of both beside the speed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.bench.columns import NONE, figure
from recurrent_drafter.bench.serving import SYNCHRONOUS, Record, Request, Served, Work, engine_arms
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.divergence import Divergence, first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.measure.ruler import (
    BUG,
    NOT_COMPARED,
    TIE,
    Estimate,
    Run,
    Trial,
    Verdict,
    judge,
    ratio,
    verdict,
)
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier


def trials_of(records: Sequence[Record]) -> list[Trial]:
    """What every arm made of each piece of work, in order."""
    runs: dict[int, dict[str, Run]] = {}
    for record in records:
        if record["kind"] == "turn":
            served = Served([Request(**request) for request in record["requests"]], record["seconds"])
            runs.setdefault(record["number"], {})[record["arm"]] = served.as_run()
    return [Trial(None, runs[number]) for number in sorted(runs)]


def judged(
    records: Sequence[Record], works: Sequence[Work], verifier: Verifier, drafter: RecurrentDrafter, length: int
) -> Iterator[Record]:
    """Greedy output compared with the base's, and the acceptance that the walk along the base's replies predicts.

    When sampling the outputs are of one law only. The walk still predicts: a draft token is accepted where the
    verifier draws that very token.
    """
    trials = trials_of(records)
    if works[0].temperature == 0:
        for name in trials[0].runs:
            verdicts = [
                one for trial, work in zip(trials, works, strict=True) for one in _judged(trial, work, name, verifier)
            ]
            found = [(n, v.divergence) for n, v in enumerate(verdicts) if v.outcome == BUG and v.divergence is not None]
            ties = [v.margin for v in verdicts if v.outcome == TIE]
            bugs = [f"prompt {number}, {divergence.verdict}" for number, divergence in found]
            yield {"kind": "equality", "arm": name, "ties": len(ties), "margins": ties, "bugs": bugs}
    replies = [
        Reply(torch.tensor(prompt), torch.tensor(reply))
        for trial, work in zip(trials, works, strict=True)
        for prompt, reply in zip(work.prompts, trial.runs[SYNCHRONOUS].ids, strict=True)
    ]
    held_out = HeldOutReplies(verifier, replies)
    for arm in engine_arms(length):
        if arm.name in trials[0].runs and arm.width is not None:
            predicted = chain_tokens_per_step(held_out, drafter, arm.width, length)
            yield {"kind": "predicted", "arm": arm.name, "tokens_per_step": predicted}


def _judged(trial: Trial, work: Work, name: str, verifier: Verifier) -> list[Verdict]:
    def explain(row: int, expected: Sequence[int], found: Sequence[int]) -> Divergence | None:
        return first_divergence(verifier, torch.tensor(work.prompts[row]), expected, found)

    return judge(trial.runs[name], trial.runs[SYNCHRONOUS], explain)


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
    """One arm at one concurrency and temperature. Milliseconds are means over the requests; NaN: does not apply."""

    concurrency: int
    temperature: float
    arm: str
    trials: Sequence[Trial]
    predicted: float
    equality: str

    @property
    def requests(self) -> list[Request]:
        return [request for trial in self.trials for request in trial.runs[self.arm].more]

    @property
    def rate(self) -> float:
        return float(np.median([trial.runs[self.arm].rate for trial in self.trials]))

    @property
    def over_base(self) -> Estimate:
        return Estimate(NONE) if self.arm == SYNCHRONOUS else ratio(self.trials, self.arm, SYNCHRONOUS)

    @property
    def accepted_length(self) -> float:
        drafts = sum(request.drafts for request in self.requests)
        return 1 + sum(request.accepted for request in self.requests) / drafts if drafts else NONE


def serving_rows(records: Sequence[Record]) -> list[ServingRow]:
    """A row for each arm of a file."""
    cell, *_ = records
    trials = trials_of(records)
    predicted = {record["arm"]: record["tokens_per_step"] for record in records if record["kind"] == "predicted"}
    equality = {record["arm"]: _verdicts(record) for record in records if record["kind"] == "equality"}
    return [
        ServingRow(
            cell["concurrency"], cell["temperature"], name, trials, predicted.get(name, NONE),
            "" if name == SYNCHRONOUS else verdict(equality.get(name, [Verdict(NOT_COMPARED)])),
        )
        for name in trials[0].runs
    ]  # fmt: skip


def _verdicts(record: Record) -> list[Verdict]:
    margins = record.get("margins", [None] * record["ties"])  # which older files lack
    return [*(Verdict(TIE, margin) for margin in margins), *(Verdict(BUG) for _ in record["bugs"])]


SERVING_COLUMNS: dict[str, Callable[[ServingRow], str]] = {
    "concurrency": lambda row: str(row.concurrency),
    "temperature": lambda row: f"{row.temperature:g}",
    "engine": lambda row: row.arm,
    "tokens/s": lambda row: f"{row.rate:.1f}",
    "vs no speculation": lambda row: f"{row.over_base:.2f}",
    "first token, ms": lambda row: f"{1e3 * np.mean([request.first for request in row.requests]):.0f}",
    "between tokens, ms": lambda row: f"{1e3 * np.mean([request.between for request in row.requests]):.2f}",
    "accepted length": lambda row: figure(row.accepted_length),
    "predicted": lambda row: figure(row.predicted),
    "identical": lambda row: row.equality,
}
