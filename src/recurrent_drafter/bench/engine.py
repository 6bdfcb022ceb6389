"""Measure one cell: arms side by side, what is attainable, where time and memory go."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench import workload
from recurrent_drafter.bench.columns import Record, run_records
from recurrent_drafter.bench.profile import Profile, memory_of, profiled
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import AUTO, OUR_LOOKUP, PLAIN, Batch, Decoding, shape_name
from recurrent_drafter.measure.estimate import break_even
from recurrent_drafter.measure.replies import HeldOutReplies, Reply
from recurrent_drafter.measure.ruler import Trial, compare
from recurrent_drafter.measure.step_costs import packed_costs
from recurrent_drafter.measure.tuning import DraftRanks, measure_acceptance
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier

FIXED = DraftShape(beam_width=10, beam_length=4)
CHAINS = (DraftShape(1, 4), DraftShape(1, 8))
NODES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 41, 48, 64)
MOST_REPLIES = 16  # that acceptance is measured on


@dataclass(frozen=True)
class Effort:
    """How much to run: batches per cell, new tokens per reply, whether to profile and count memory too."""

    prompts: int
    new_tokens: int
    profile: bool = False


@lru_cache(maxsize=1)
def verifier_of(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, Callable[[int, int], list[Tensor]]]:
    """A cell's model, and what makes its prompts: (count, length) to prompts; the newest is kept for the next cell."""
    if name == workload.DEMO:
        model, tokenizer = load_verifier(workload.DEMO, dtype=dtype, device=device)
        return model, lambda count, length: workload.demo_prompts(tokenizer, count, length)
    model = workload.random_model(workload.SHAPES[name](), getattr(torch, dtype), device)
    vocabulary = Verifier(model).vocab_size
    return model, lambda count, length: workload.random_prompts(vocabulary, count, length)


def measure(cell: workload.BenchCell, effort: Effort, device: str) -> Iterator[Record]:
    """Everything about a cell, as records for a file of JSON lines."""
    model, make_prompts = verifier_of(cell.model, cell.dtype, device)
    batches = ways.batches_of(make_prompts(effort.prompts * cell.batch, cell.context), cell.batch, model.device)
    decoding = Decoding(effort.new_tokens, sampling=ways.at_temperature(cell.temperature))
    if cell.hit_rate is None:
        speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model)
        speculator = speculator.with_lookup(False)  # what is attainable is known of a drafter alone
        assert speculator.drafter is not None
        shapes = [FIXED, speculator.drafter.config.draft_shape]
        lookup = ways.lookup_fits(speculator.verifier, batches, effort.new_tokens)
    else:
        speculator = workload.oracle_for(model, cell.hit_rate)
        teach(speculator, batches, effort.new_tokens)
        shapes, lookup = [FIXED, *CHAINS], False
    arms = ways.standard_arms(speculator, decoding, shapes, lookup=lookup)
    trials = list(compare(arms, batches, ways.explaining(speculator.verifier, decoding)))
    yield from run_records(trials)
    yield from limits(speculator, batches[0], known_replies(trials, PLAIN), shapes)
    if effort.profile:
        found = inside(speculator, batches[: max(len(batches) // 4, 1)], decoding, shapes[0])
        for arm, (profile, memory) in found.items():
            yield {"kind": "profile", "arm": arm, "stages": profile.rows, "overhead": profile.overhead}
            yield {"kind": "memory", "arm": arm, **memory}


def teach(speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], new_tokens: int) -> None:
    """Let an oracle know what the verifier says to the prompts, by plain autoregression."""
    oracle = speculator.drafter
    assert isinstance(oracle, workload.OracleDrafter)
    alone = ways.our_arm(PLAIN, speculator.without_drafter(), Decoding(new_tokens))
    for batch in batches:
        for prompt, reply in zip(batch.input_ids, alone.run(batch).ids, strict=True):
            oracle.learn(prompt, reply)


def known_replies(trials: Sequence[Trial], arm: str) -> list[Reply]:
    return [
        Reply(trial.batch.prompt(row).cpu(), torch.tensor(tokens))
        for trial in trials
        for row, tokens in enumerate(trial.runs[arm].ids)
    ]


def limits(
    speculator: RecurrentDraftingSpeculator, batch: Batch, replies: Sequence[Reply], shapes: Sequence[DraftShape]
) -> Iterator[Record]:
    """What each arm could attain with its own way of drafting: its width, and its length or, for auto, any up to it."""
    drafter, verifier = speculator.drafter, speculator.verifier
    assert drafter is not None
    longest = DraftShape(drafter.config.draft_shape.beam_width, LONGEST)
    arms = {shape_name(shape): (shape, [shape.beam_length]) for shape in shapes}
    for name, (shape, lengths) in {**arms, AUTO: (longest, list(range(1, LONGEST + 1)))}.items():
        acceptance = acceptance_along(verifier, drafter, replies, shape)
        costs = costs_at(verifier, drafter, batch, shape)
        times = {"rows": costs.rows, "verify": costs.verify, "draft": list(costs.drafts.values())}
        yield {"kind": "curves", "arm": name, "width": shape.beam_width, **times}
        best = attainable(costs, acceptance.tokens_per_step, lengths, shape.beam_width)
        yield {"kind": "limit", "arm": name, **asdict(best)}


def acceptance_along(
    verifier: Verifier, drafter: RecurrentDrafter, replies: Sequence[Reply], longest: DraftShape
) -> DraftRanks:
    """How drafts up to this shape fare along known replies; an oracle's need no pass, for its hits are known."""
    chosen, length = replies[:MOST_REPLIES], longest.beam_length
    if isinstance(drafter, workload.OracleDrafter):
        return DraftRanks([drafter.ranks(reply.prompt, len(reply.tokens), length) for reply in chosen])
    return measure_acceptance(HeldOutReplies(verifier, chosen), drafter, longest.beam_width, length)


def costs_at(verifier: Verifier, drafter: RecurrentDrafter, batch: Batch, longest: DraftShape) -> Costs:
    """What steps and drafts up to this shape take after prompts like those of ``batch``, as decoding runs them."""
    rows, context = batch.input_ids.shape
    width, length = longest.beam_width, longest.beam_length
    counts = [count for count in NODES if count <= 1 + width * length]
    lengths = range(1, length + 1)
    return packed_costs(verifier, drafter, context, batch=rows, rows=counts, widths=(width,), lengths=lengths)


@dataclass(frozen=True)
class Attainable:
    """The best speed-up over autoregression, and the tree that gives it: draft length 0 is autoregression itself."""

    speedup: float
    length: int
    nodes: int


def attainable(
    costs: Costs, tokens_per_step: Callable[[int, int], float], lengths: Sequence[int], width: int
) -> Attainable:
    """The largest E(n) t(1) / (t(n) + t_draft) over these draft lengths and all measured n: no fixed tree gains more.

    A step that drafts and verifies n nodes, the root included, takes t(n) + t_draft, where autoregression takes t(1)
    for one token; ``tokens_per_step`` is E, what it yields, of a draft length and n.

    >>> costs = Costs(rows=(1, 2, 3), verify=(4.0, 5.0, 7.0), draft_level=1.0)
    >>> attainable(costs, lambda length, nodes: float(nodes), lengths=[1, 2], width=1)
    Attainable(speedup=1.3333333333333333, length=1, nodes=2)
    """
    best = Attainable(1.0, 0, 1)
    for length in lengths:
        for nodes in (rows // costs.batch for rows in costs.rows):
            if 1 < nodes <= 1 + length * width:
                speedup = tokens_per_step(length, nodes) / break_even(costs, DraftShape(width, length, nodes))
                best = max(best, Attainable(speedup, length, nodes), key=lambda found: found.speedup)
    return best


def inside(
    speculator: RecurrentDraftingSpeculator, batches: Sequence[Batch], decoding: Decoding, fixed: DraftShape
) -> dict[str, tuple[Profile, dict[str, float]]]:
    """Where time and memory go at the fixed shape, and by ``auto``; by lookup alone where there is no drafter."""
    found, shapes = {}, {shape_name(fixed): fixed, AUTO: None}
    for name, shape in shapes.items() if speculator.drafter is not None else [(OUR_LOOKUP, None)]:
        varied = speculator.with_shape(shape)
        arm = ways.our_arm(name, varied, decoding)
        with profiled() as profile:
            for batch in batches:
                arm.run(batch)
        found[name] = profile, memory_of(varied, lambda: arm.run(batches[0]))  # noqa: B023  called at once
    return found
