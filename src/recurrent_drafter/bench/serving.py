"""vLLM's engine with and without drafters, side by side: each arm in a process of its own, in short turns.

What the turns say is held against the engine without speculation, and against what the acceptance walk predicts.
"""

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.bench.columns import NONE, Record, Row, Shown, figure, rows_of
from recurrent_drafter.measure import ruler
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, chain_tokens_per_step
from recurrent_drafter.measure.ruler import Arm, Run, Trial, Verdict, interleave
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

SYNCHRONOUS, ASYNCHRONOUS, NGRAM, SAMPLED = "no speculation", "no speculation, asynchronous", "ngram", "sampled drafts"
BEAMS = {"ours, 1 beam": 1, "ours, 4 beams": 4, "ours, 10 beams": 10}
WARM_UP = 32  # tokens of each reply: enough for the proposer to have tried how much to draft
# One process computes at a time; a second thread would wait for the first more than it helps a small model.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",  # of vLLM's n-gram lookup
}


@dataclass(frozen=True)
class EngineArm:
    """An engine to measure: how it speculates (``speculative``, None: not), and how it schedules.

    ``width`` is that of the beams whose best one is verified; None where there are none.
    """

    name: str
    speculative: dict[str, Any] | None = None
    additional: dict[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    width: int | None = None

    def settings(self, longest: int, most: int) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for texts of at most ``longest`` tokens, ``most`` of them at once."""
        own: dict[str, Any] = {"additional_config": {"recurrent_drafter": self.additional}} if self.additional else {}
        if self.speculative is not None:
            own |= {"speculative_config": self.speculative, "per_request_spec_decode_metrics": "summary"}
        return {
            "model": str(demo_verifier_path()),
            "dtype": "float32",
            "enforce_eager": not torch.cuda.is_available(),
            "max_model_len": longest,
            "max_num_seqs": most,
            "kv_cache_memory_bytes": 256 << 20,
            "enable_prefix_caching": False,  # every arm reads every prompt, as often as it is asked
            "async_scheduling": self.asynchronous,
            "disable_log_stats": False,
            **own,
        }


def engine_arms(length: int, *, shed: bool = True) -> list[EngineArm]:
    """The synchronous engine without speculation first: the base of ratios, and of equality."""
    ours = {"model": str(demo_drafter_path()), "num_speculative_tokens": length}
    lookup = {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    beams = [
        EngineArm(name, ours, {"beam_width": width, "drafts": "beam", "shed": shed}, width=width)
        for name, width in BEAMS.items()
    ]
    sampled = EngineArm(SAMPLED, ours, {"drafts": "sampled", "shed": shed})
    plain = [EngineArm(SYNCHRONOUS), EngineArm(ASYNCHRONOUS, asynchronous=True), EngineArm(NGRAM, lookup)]
    return [*plain, *beams, sampled]


@dataclass(frozen=True)
class Work:
    """Requests to run, ``concurrency`` of them at a time: a new one begins when one ends."""

    prompts: list[list[int]]
    concurrency: int
    new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Request:
    """One request: its tokens, seconds to the first and from each to the next, drafts verified, tokens accepted."""

    tokens: list[int]
    first: float
    between: float
    drafts: int
    accepted: int


def as_run(requests: Sequence[Request], seconds: float) -> Run:
    """What the ruler takes: all requests of one piece of work, in so many seconds, prompts included."""
    return Run([request.tokens for request in requests], seconds, more=requests)


@dataclass
class _Running:
    """A request on its way: when it began, and when tokens came."""

    number: int
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        if self.tokens:
            self.times.append(time.perf_counter())

    def ended(self, drafted: Any) -> Request:
        histogram = drafted.histogram if drafted is not None else []
        begun, first, last = self.times[0], self.times[1], self.times[-1]
        between = (last - first) / max(len(self.tokens) - 1, 1)
        accepted = sum(count * steps for count, steps in enumerate(histogram))
        return Request(self.tokens, first - begun, between, sum(histogram), accepted)


_engine: Any = None  # of a process that serves
_names = map(str, itertools.count())  # of its requests


def _start(settings: dict[str, Any]) -> None:
    global _engine
    from vllm import LLM

    _engine = LLM(**settings).llm_engine


def _serve(work: Work) -> Run:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # No seed: with one vLLM (0.32.0) samples row by row, which is another speed.
    options = SamplingParams(
        temperature=work.temperature,
        max_tokens=work.new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    waiting = list(enumerate(work.prompts))[::-1]
    running: dict[str, _Running] = {}
    done: dict[int, Request] = {}
    begun = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < work.concurrency:
            (number, prompt), name = waiting.pop(), next(_names)
            running[name] = _Running(number)
            _engine.add_request(name, {"prompt_token_ids": prompt}, options)
        for output in _engine.step():
            one = running[output.request_id]
            one.add(output.outputs[0].token_ids)
            if output.finished:
                done[one.number] = one.ended(output.outputs[0].spec_decode_metrics)
                del running[output.request_id]
    return as_run([done[number] for number in sorted(done)], time.perf_counter() - begun)


@contextmanager
def engines(arms: Sequence[EngineArm], longest: int, most: int) -> Iterator[list[Arm]]:
    """Every arm's engine, ready in a process of its own; each idles while another one works."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    context, ready = multiprocessing.get_context("spawn"), []
    with ExitStack() as stack:
        for arm in arms:
            process = stack.enter_context(ProcessPoolExecutor(1, context))
            process.submit(_start, arm.settings(longest, most)).result()

            def run(work: Work, process: ProcessPoolExecutor = process) -> Run:
                return process.submit(_serve, work).result()

            ready.append(Arm(arm.name, run))
        yield ready


def measure(
    arms: Sequence[Arm], works: Sequence[Work], verifier: Verifier, drafter: RecurrentDrafter, length: int
) -> Iterator[Record]:
    """Every piece of work by every engine, in an order that changes, and then what `judged` says of it all.

    To warm up, each does the beginning of the first.
    """
    trials = []
    warm_up = replace(works[0], new_tokens=min(works[0].new_tokens, WARM_UP))
    for number, trial in enumerate(interleave(arms, works, warm_up=lambda _: warm_up)):
        for name, run in trial.runs.items():
            requests = list(map(asdict, run.more))
            yield {"kind": "turn", "arm": name, "number": number, "requests": requests, "seconds": run.seconds}
        trials.append(trial)
    yield from judged(trials, works, verifier, drafter, length)


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
    trials: Sequence[Trial], works: Sequence[Work], verifier: Verifier, drafter: RecurrentDrafter, length: int
) -> Iterator[Record]:
    """Greedy output compared with the base's, and the acceptance that the walk along the base's replies predicts.

    When sampling the outputs are of one law only. The walk still predicts: a draft token is accepted where the
    verifier draws that very token.
    """
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


def serving_rows(records: Sequence[Record]) -> list[Row]:
    return rows_of(trials_of(records), records)


def requests(row: Row) -> list[Request]:
    return [request for run in row.runs for request in run.more]


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
    "first token, ms": lambda row: f"{1e3 * np.mean([request.first for request in requests(row)]):.0f}",
    "between tokens, ms": lambda row: f"{1e3 * np.mean([request.between for request in requests(row)]):.2f}",
    "accepted length": lambda row: figure(accepted_length(row)),
    "predicted": lambda row: figure(row.recorded("predicted", "tokens_per_step")),
    "identical": lambda row: "" if row.arm == SYNCHRONOUS else ruler.verdict(row.verdicts),
}
