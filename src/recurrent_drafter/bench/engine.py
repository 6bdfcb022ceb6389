"""Measure one cell: arms side by side, what is attainable, where the time goes, what memory it takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.attainable import Expected, attainable, costs_at, expected_along
from recurrent_drafter.bench.cells import DEMO, BenchCell
from recurrent_drafter.bench.columns import run_records
from recurrent_drafter.bench.memory import Memory, memory_of
from recurrent_drafter.bench.oracle import OracleDrafter
from recurrent_drafter.bench.profile import Profile, profiled
from recurrent_drafter.bench.workload import demo_prompts, model_of_shape, oracle_for, random_prompts
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import AUTO, PLAIN, Batch, Decoding, shape_name
from recurrent_drafter.measure.replies import Reply
from recurrent_drafter.measure.ruler import Trial, compare
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier

FIXED = DraftShape(beam_width=10, beam_length=4)
CHAINS = (DraftShape(1, 4), DraftShape(1, 8))
Record = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much to run: batches per cell, new tokens per reply, whether to profile and count memory too."""

    prompts: int = 20
    new_tokens: int = 128
    profile: bool = False


@lru_cache(maxsize=1)
def verifier_of(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, Callable[[int, int], list[Tensor]]]:
    """A cell's model, and what makes its prompts: (count, length) to prompts; the newest is kept for the next cell."""
    if name == DEMO:
        model, tokenizer = load_verifier(DEMO, dtype=dtype, device=device)
        return model, lambda count, length: demo_prompts(tokenizer, count, length)
    model = model_of_shape(name, getattr(torch, dtype), device)
    vocabulary = Verifier(model).vocab_size
    return model, lambda count, length: random_prompts(vocabulary, count, length)


def measure(cell: BenchCell, effort: Effort, device: str) -> Iterator[Record]:
    """Everything about a cell, as records for a file of JSON lines."""
    model, make_prompts = verifier_of(cell.model, cell.dtype, device)
    batches = ways.batches_of(make_prompts(effort.prompts * cell.batch, cell.context), cell.batch, model.device)
    decoding = Decoding(effort.new_tokens, sampling=ways.at_temperature(cell.temperature))
    if cell.hit_rate is None:
        speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model)
    else:
        speculator = oracle_for(model, cell.hit_rate)
        teach(speculator, batches, effort.new_tokens)
    assert speculator.drafter is not None
    saved = speculator.drafter.config.draft_shape
    shapes = [FIXED, saved] if cell.hit_rate is None else [FIXED, *CHAINS]
    lookup = cell.hit_rate is None and ways.lookup_fits(speculator.verifier, batches, effort.new_tokens)
    arms = ways.standard_arms(speculator, decoding, shapes, lookup=lookup)
    trials = list(compare(arms, batches, ways.explaining(speculator.verifier, decoding)))
    yield from run_records(trials)
    yield from limits(speculator, batches[0], known_replies(trials, PLAIN), shapes, saved)
    if effort.profile:
        for found in inside(speculator, batches[: max(len(batches) // 4, 1)], decoding, shapes[0]):
            yield {
                "kind": "profile",
                "arm": found.arm,
                "stages": found.profile.rows,
                "overhead": found.profile.overhead,
            }
            yield {"kind": "memory", "arm": found.arm, **found.memory.mebibytes()}


def teach(speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], new_tokens: int) -> None:
    """Let an oracle know what the verifier says to the prompts, by plain autoregression."""
    oracle = speculator.drafter
    assert isinstance(oracle, OracleDrafter)
    alone = ways.our_arm(PLAIN, ways.without_drafter(speculator), Decoding(new_tokens))
    for batch in batches:
        for prompt, reply in zip(batch.input_ids, alone.run(batch).ids, strict=True):
            oracle.learn(prompt, reply)


def known_replies(trials: Sequence[Trial], arm: str) -> list[Reply]:
    """An arm's replies with their prompts."""
    return [
        Reply(trial.batch.prompt(row).cpu(), torch.tensor(tokens))
        for trial in trials
        for row, tokens in enumerate(trial.runs[arm].ids)
    ]


def limits(
    speculator: RecurrentDraftingSpeculator,
    batch: Batch,
    replies: Sequence[Reply],
    shapes: Sequence[DraftShape],
    saved: DraftShape,
) -> Iterator[Record]:
    """What each arm could attain with its own way of drafting: its width, and its length or, for auto, any up to it."""
    drafter, verifier = speculator.drafter, speculator.verifier
    assert drafter is not None
    expected: dict[int, Expected] = {}
    arms = {shape_name(shape): (shape, [shape.beam_length]) for shape in shapes}
    arms[AUTO] = (DraftShape(saved.beam_width, LONGEST), list(range(1, LONGEST + 1)))
    for name, (shape, lengths) in arms.items():
        width = shape.beam_width
        if width not in expected:
            expected[width] = expected_along(verifier, drafter, replies, width)
        costs = costs_at(verifier, drafter, batch, width, shape.beam_length)
        times = {"rows": costs.rows, "verify": costs.verify, "draft": list(costs.drafts.values())}
        yield {"kind": "curves", "arm": name, "width": width, **times}
        yield {"kind": "limit", "arm": name, **asdict(attainable(costs, expected[width], lengths, width))}


@dataclass(frozen=True)
class Inside:
    """Where an arm's time and memory go."""

    arm: str
    profile: Profile
    memory: Memory


def inside(
    speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], decoding: Decoding, fixed: DraftShape
) -> Iterator[Inside]:
    """At the fixed shape, and by ``auto``."""
    for name, shape in ((shape_name(fixed), fixed), (AUTO, None)):
        varied = ways.variant(speculator, shape)
        arm = ways.our_arm(name, varied, decoding)
        with profiled() as profile:
            for batch in batches:
                arm.run(batch)
        yield Inside(name, profile, memory_of(varied, lambda arm=arm: arm.run(batches[0])))  # type: ignore[misc]
