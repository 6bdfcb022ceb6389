"""vLLM's engine with and without drafters, side by side: each arm in a process of its own, in short turns."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.measure.ruler import Arm, Run, interleave

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
Record = dict[str, Any]


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
    return [
        EngineArm(SYNCHRONOUS),
        EngineArm(ASYNCHRONOUS, asynchronous=True),
        EngineArm(NGRAM, lookup),
        *beams,
        EngineArm(SAMPLED, ours, {"drafts": "sampled", "shed": shed}),
    ]


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
    """Requests of one piece of work, and how long they took together, prompts included, as the ruler takes them."""
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


def measure_turns(arms: Sequence[Arm], works: Sequence[Work]) -> Iterator[Record]:
    """Every piece of work by every engine, in an order that changes; the beginning of the first to warm up."""
    warm_up = replace(works[0], new_tokens=min(works[0].new_tokens, WARM_UP))
    for number, trial in enumerate(interleave(arms, works, warm_up=lambda _: warm_up)):
        for name, run in trial.runs.items():
            requests = list(map(asdict, run.more))
            yield {"kind": "turn", "arm": name, "number": number, "requests": requests, "seconds": run.seconds}
