"""vLLM's engine with and without drafters, side by side (layer 4): each arm in a process of its own, in short turns."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.beam import Beams
from recurrent_drafter.bench.summary import Ratio, figure, ratio
from recurrent_drafter.decode import BeamDrafter
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.metrics import Walk, median_interval, walk
from recurrent_drafter.replies import HeldOutReplies, Reply, accepted_along
from recurrent_drafter.tree import prefix_tree
from recurrent_drafter.verifier import Verifier
from recurrent_drafter.verify import first_divergence

SYNCHRONOUS, ASYNCHRONOUS, NGRAM, SAMPLED = "no speculation", "no speculation, asynchronous", "ngram", "sampled drafts"
BEAMS = {"ours, 1 beam": 1, "ours, 4 beams": 4, "ours, 10 beams": 10}
WARM_UP = 32  # tokens of each reply: enough for the proposer to have tried how much to draft
# One process computes at a time; a second thread would wait for the first more than it helps a small model.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
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
    beams = [EngineArm(name, ours, {"beam_width": width, "shed": shed}, width=width) for name, width in BEAMS.items()]
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


@dataclass(frozen=True)
class Turn:
    """What an engine did with its work, and how long all of it took."""

    requests: list[Request]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second of all requests together, prompts included."""
        return sum(len(request.tokens) for request in self.requests) / self.seconds


class Engine:
    """vLLM in this process."""

    def __init__(self, arm: EngineArm, longest: int, most: int) -> None:
        from vllm import LLM

        self._engine = LLM(**arm.settings(longest, most)).llm_engine
        self._count = 0

    def run(self, work: Work) -> Turn:
        """Run requests to their ends."""
        waiting = list(enumerate(work.prompts))[::-1]
        running: dict[str, _Running] = {}
        done: dict[int, Request] = {}
        begun = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < work.concurrency:
                number, prompt = waiting.pop()
                running[self._add(prompt, work)] = _Running(number, time.perf_counter())
            for output in self._engine.step():
                one = running[output.request_id]
                one.add(output.outputs[0])
                if output.finished:
                    done[one.number] = one.ended(output.outputs[0].spec_decode_metrics)
                    del running[output.request_id]
        return Turn([done[number] for number in sorted(done)], time.perf_counter() - begun)

    def _add(self, prompt: list[int], work: Work) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        # No seed: with one vLLM (0.32.0) samples row by row, which is another speed.
        options = SamplingParams(
            temperature=work.temperature,
            max_tokens=work.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, options)
        return str(self._count)


class _Running:
    """A request on its way."""

    def __init__(self, number: int, begun: float) -> None:
        self.number, self._begun = number, begun
        self._tokens: list[int] = []
        self._first = self._last = begun

    def add(self, output: Any) -> None:
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        self._tokens += output.token_ids

    def ended(self, drafted: Any) -> Request:
        histogram = drafted.histogram if drafted is not None else []
        return Request(
            self._tokens,
            self._first - self._begun,
            (self._last - self._first) / max(len(self._tokens) - 1, 1),
            sum(histogram),
            sum(count * accepted for accepted, count in enumerate(histogram)),
        )


def _engine_process(arm: EngineArm, longest: int, most: int, connection: Any) -> None:
    engine = Engine(arm, longest, most)
    connection.send(None)
    while (work := connection.recv()) is not None:
        connection.send(engine.run(work))


@contextmanager
def engines(arms: Sequence[EngineArm], longest: int, most: int) -> Iterator[dict[str, Callable[[Work], Turn]]]:
    """Every arm's engine, ready, by name; each idles while another one works."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ready: dict[str, Callable[[Work], Turn]] = {}
        for arm in arms:
            ours, theirs = context.Pipe()
            process = context.Process(target=_engine_process, args=(arm, longest, most, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(_end, ours)
            ours.recv()  # raises EOFError if the engine did not start; its log says why

            def run(work: Work, connection: Any = ours) -> Turn:
                connection.send(work)
                turn = connection.recv()
                assert isinstance(turn, Turn)
                return turn

            ready[arm.name] = run
        yield ready


def _end(connection: Any) -> None:
    try:
        connection.send(None)
    except OSError:
        return  # it has ended already


def measure_turns(
    run: Mapping[str, Callable[[Work], Turn]], works: Sequence[Work], done: Callable[[], None] = lambda: None
) -> Iterator[Record]:
    """Every piece of work by every engine, in an order that changes; the beginning of the first to warm up."""
    names = list(run)
    for name in names:
        run[name](replace(works[0], new_tokens=min(works[0].new_tokens, WARM_UP)))
    for number, work in enumerate(works):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            yield {"kind": "turn", "arm": name, "number": number, **asdict(run[name](work))}
        done()


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
