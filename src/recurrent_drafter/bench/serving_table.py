"""What turns of vLLM's engines say: equality, predicted acceptance, and a table of both beside the speed."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.bench.columns import NONE, Row, Shown, figure, rows_of
from recurrent_drafter.bench.serving import SYNCHRONOUS, Record, Request, Work, as_run, engine_arms
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.metrics import Walk, walk
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.measure import ruler
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.measure.ruler import Run, Trial, Verdict
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier


def trials_of(records: Sequence[Record]) -> list[Trial]:
    """What every arm made of each piece of work, in order; the verdicts of all stand at the first."""
    runs: dict[int, dict[str, Run]] = {}
    verdicts: dict[str, list[Verdict]] = {}
    for record in records:
        if record["kind"] == "turn":
            run = as_run([Request(**request) for request in record["requests"]], record["seconds"])
            runs.setdefault(record["number"], {})[record["arm"]] = run
            verdicts.setdefault(record["arm"], [Verdict(ruler.NOT_COMPARED)])
        elif record["kind"] == "equality":
            margins = record.get("margins", [None] * record["ties"])  # which older files lack
            ties = [Verdict(ruler.TIE, margin) for margin in margins]
            verdicts[record["arm"]] = ties + [Verdict(ruler.BUG)] * len(record["bugs"])
    return [Trial(None, runs[number], {} if place else verdicts) for place, number in enumerate(sorted(runs))]


def judged(
    records: Sequence[Record], works: Sequence[Work], verifier: Verifier, drafter: RecurrentDrafter, length: int
) -> Iterator[Record]:
    """Greedy output compared with the base's, and the acceptance that the walk along the base's replies predicts.

    When sampling the outputs are of one law only. The walk still predicts: a draft token is accepted where the
    verifier draws that very token.
    """
    trials = trials_of(records)
    for name in trials[0].runs if works[0].temperature == 0 else ():
        verdicts = [
            verdict
            for trial, work in zip(trials, works, strict=True)
            for verdict in ruler.judge(trial.runs[name], trial.runs[SYNCHRONOUS], explaining(verifier, work))
        ]
        ties = [verdict.margin for verdict in verdicts if verdict.outcome == ruler.TIE]
        bugs = [f"prompt {n}, {v.divergence.verdict}" for n, v in enumerate(verdicts)
                if v.outcome == ruler.BUG and v.divergence is not None]  # fmt: skip
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


def explaining(verifier: Verifier, work: Work) -> ruler.Explain:
    """Greedy divergences of this work's requests."""
    return lambda row, *ids: first_divergence(verifier, torch.tensor(work.prompts[row]), *ids)


def chain_tokens_per_step(held_out: HeldOutReplies, drafter: RecurrentDrafter, width: int, length: int) -> float:
    """What decoding of these replies yields where of each step's beams only the best is verified."""
    drafts = held_out.drafts(drafter, width, length)
    accepted = (accepted_along(root, prefix_tree(root, best_beam(beams), length + 1)) for root, beams in drafts)
    return sum((walk(one.n_accepted.tolist()) for one in accepted), Walk(0, 0)).tokens_per_step


def best_beam(beams: Beams) -> Beams:
    """The most probable beam of full length alone, as one that was searched with width 1.

    >>> beams = Beams(torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[0, 0], [1, 0]]]), torch.zeros(1, 2, 2))
    >>> best_beam(beams).tokens.tolist()
    [[[6], [7]]]
    """
    tokens: Tensor = beams.paths[:, 0, :, None]  # (B, L, 1)
    return Beams(tokens, torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device))


def serving_rows(records: Sequence[Record]) -> list[Row]:
    """A row for each arm of a file."""
    return rows_of(trials_of(records), records)


def requests(row: Row) -> list[Request]:
    return [request for run in row.runs for request in run.more]


def milliseconds(row: Row, name: str) -> float:
    """The mean over the requests."""
    return 1e3 * float(np.mean([getattr(request, name) for request in requests(row)]))


def accepted_length(row: Row) -> float:
    """Tokens for each draft that was verified; NaN without any."""
    drafts = sum(request.drafts for request in requests(row))
    return 1 + sum(request.accepted for request in requests(row)) / drafts if drafts else NONE


SERVING_COLUMNS: Shown = {
    "concurrency": lambda row: str(row.records[0]["concurrency"]),
    "temperature": lambda row: f"{row.records[0]['temperature']:g}",
    "engine": lambda row: row.arm,
    "tokens/s": lambda row: f"{row.rate:.1f}",
    "vs no speculation": lambda row: f"{row.over(SYNCHRONOUS):.2f}",
    "first token, ms": lambda row: f"{milliseconds(row, 'first'):.0f}",
    "between tokens, ms": lambda row: f"{milliseconds(row, 'between'):.2f}",
    "accepted length": lambda row: figure(accepted_length(row)),
    "predicted": lambda row: figure(row.recorded("predicted", "tokens_per_step")),
    "identical": lambda row: "" if row.arm == SYNCHRONOUS else ruler.verdict(row.verdicts),
}
