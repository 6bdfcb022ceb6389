"""Measure one cell: arms side by side, what is attainable, where the time goes, what memory it takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.attainable import Expected, attainable, expected_along, measure_curves
from recurrent_drafter.bench.cells import DEMO, Cell
from recurrent_drafter.bench.memory import memory_of
from recurrent_drafter.bench.oracle import OracleDrafter
from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.bench.workload import demo_prompts, model_of_shape, oracle_for, random_prompts
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import AUTO, PLAIN, lookup_fits, shape_name, standard_arms, variant
from recurrent_drafter.measure.comparison import ArmResult, Batch, Decoding, batches_of, compare
from recurrent_drafter.measure.replies import Reply
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


def measure(cell: Cell, effort: Effort, device: str, done: Callable[[], None] = lambda: None) -> Iterator[Record]:
    """Everything about a cell, as records for a file of JSON lines."""
    model, make_prompts = verifier_of(cell.model, cell.dtype, device)
    batches = batches_of(make_prompts(effort.prompts * cell.batch, cell.context), cell.batch, model.device)
    decoding = Decoding(effort.new_tokens, temperature=cell.temperature)
    if cell.hit_rate is None:
        speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model)
    else:
        speculator = oracle_for(model, cell.hit_rate)
        teach(speculator, batches, effort.new_tokens)
    assert speculator.drafter is not None
    saved = speculator.drafter.config.draft_shape
    shapes = [FIXED, saved] if cell.hit_rate is None else [FIXED, *CHAINS]
    lookup = cell.hit_rate is None and lookup_fits(speculator.verifier, batches, effort.new_tokens)
    arms = standard_arms(speculator, decoding, shapes, lookup=lookup)
    results = compare(arms, batches, speculator.verifier, decoding, done=done)
    for result in results:
        yield from run_records(result)
    replies = known_replies(next(result for result in results if result.name == PLAIN), batches)
    yield from limits(speculator, batches[0], replies, shapes, saved)
    if effort.profile:
        yield from inside(speculator, batches[: max(len(batches) // 4, 1)], decoding, shapes[0])


def teach(speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], new_tokens: int) -> None:
    """Let an oracle know what the verifier says to the prompts, by plain autoregression."""
    oracle = speculator.drafter
    assert isinstance(oracle, OracleDrafter)
    alone = RecurrentDraftingSpeculator(None)
    alone.attach_verifier(speculator.verifier.model)
    for batch in batches:
        output = alone.generate(
            batch.input_ids, batch.attention_mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[-1]
        )
        assert isinstance(output, Tensor)
        for prompt, reply in zip(batch.input_ids, output[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            oracle.learn(prompt, reply)


def run_records(result: ArmResult) -> Iterator[Record]:
    """One record for each run, one for each bug."""
    for number, run in enumerate(result.runs):
        yield {"kind": "run", "arm": result.name, "prompt": number, **asdict(run)}
    for bug in result.bugs:
        yield {"kind": "bug", "arm": result.name, "where": bug}


def known_replies(result: ArmResult, batches: Sequence[Batch]) -> list[Reply]:
    """An arm's replies with their prompts."""
    return [
        Reply(batch.prompt(row).cpu(), torch.tensor(tokens))
        for batch, rows in zip(batches, result.replies, strict=True)
        for row, tokens in enumerate(rows)
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
        curves = measure_curves(verifier, drafter, batch, width, shape.beam_length)
        yield {"kind": "curves", "arm": name, "width": width, **asdict(curves)}
        yield {"kind": "limit", "arm": name, **asdict(attainable(curves, expected[width], lengths, width))}


def inside(
    speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], decoding: Decoding, fixed: DraftShape
) -> Iterator[Record]:
    """Where the time and the memory go, at the fixed shape and by ``auto``."""
    names = {shape_name(fixed): variant(speculator, fixed), AUTO: variant(speculator, None)}
    arms = [arm for arm in standard_arms(speculator, decoding, [fixed], lookup=False) if arm.name in names]
    for arm in arms:
        with profiled() as profile:
            for batch in batches:
                arm.generate(batch, decoding.new_tokens)
        yield {"kind": "profile", "arm": arm.name, "stages": profile.rows, "overhead": profile.overhead}
        memory = memory_of(names[arm.name], partial(arm.generate, batches[0], min(decoding.new_tokens, 32)))
        yield {"kind": "memory", "arm": arm.name, **memory.mebibytes()}
