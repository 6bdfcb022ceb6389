"""Prompts in batches, and the ways of generating from them that are compared, all through transformers' `generate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.divergence import Divergence, Draw, first_divergence, processors_of, ways_of_computing
from recurrent_drafter.measure.replies import left_padded
from recurrent_drafter.measure.ruler import Arm, Explain, Run, now, until_end
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.verifier import Verifier

NEVER = -1  # an end token that no vocabulary has: generation goes on
LOOKUP_TOKENS = 10  # what transformers' documentation takes for prompt lookup
HF, PLAIN, LOOKUP, ASSISTED, AUTO = "HF generate", "autoregression", "HF prompt lookup", "HF assisted", "auto"
OUR_LOOKUP = "lookup"  # alone


@dataclass(frozen=True)
class Decoding:
    """How every arm decodes: tokens of a reply at most, end tokens (none: sustained), ways of sampling, seed.

    ``sampling`` are arguments of `generate`, the same for every arm.
    """

    new_tokens: int
    end_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=lambda: at_temperature(0))
    seed: int = 0

    @property
    def is_sampled(self) -> bool:
        return bool(self.sampling["do_sample"])

    @property
    def protocol(self) -> str:
        """How replies end: what a figure is nothing without."""
        if self.end_ids:
            return f"reply (up to the end token, at most {self.new_tokens})"
        return f"sustained (exactly {self.new_tokens} new tokens)"

    @property
    def drawing(self) -> str:
        return f"temperature {self.sampling['temperature']:g}" if self.is_sampled else "greedy"

    def arguments(self, new_tokens: int | None = None) -> dict[str, Any]:
        """Of `generate`, for this many new tokens."""
        ends = {"eos_token_id": list(self.end_ids) or [NEVER], "pad_token_id": 0}
        return {"max_new_tokens": new_tokens or self.new_tokens, **ends, **self.sampling}


def at_temperature(temperature: float) -> dict[str, Any]:
    """`Decoding.sampling` with temperature as the only warper; 0 is greedy."""
    warped = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return warped if temperature else {"do_sample": False}


@dataclass(frozen=True)
class Batch:
    """Prompts (B, S) to generate from together, left-padded where ``attention_mask`` is 0.

    ``row_ids`` are the rows' numbers in the noise, the same in every arm.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row_ids: Sequence[int]

    def prompt(self, row: int) -> Tensor:  # (S,), without its pads
        return self.input_ids[row][self.attention_mask[row].bool()]


def batches_of(prompts: Sequence[Tensor], size: int, device: torch.device, *, whole: bool = True) -> list[Batch]:
    """Prompts (S,) in their order, ``size`` at a time; a last batch that is not full is left out if ``whole``."""
    starts = range(0, len(prompts) - size + 1 if whole else len(prompts), size)
    groups = [prompts[start : start + size] for start in starts]
    return [
        Batch(*left_padded(group, device), range(start, start + len(group)))
        for start, group in zip(starts, groups, strict=True)
    ]


def explaining(verifier: Verifier, decoding: Decoding) -> Callable[[Batch], Explain]:
    """What `judge` asks where rows of a batch differ."""

    def explain(batch: Batch) -> Explain:
        processors = cache(lambda: processors_of(verifier, batch.input_ids, batch.attention_mask, decoding.arguments()))

        @cache  # several arms tend to part from the reference at one place
        def ways(row: int, reply: tuple[int, ...]) -> list[Tensor]:
            return ways_of_computing(verifier, batch.prompt(row), reply)

        def explained(row: int, expected: Sequence[int], found: Sequence[int]) -> Divergence | None:
            seed = decoding.seed if decoding.is_sampled else None
            draw = Draw(batch.input_ids[row], processors(), seed, batch.row_ids[row])
            return first_divergence(verifier, batch.prompt(row), expected, found, draw, partial(ways, row))

        return explained

    return explain


def hf_arm(name: str, model: PreTrainedModel, decoding: Decoding, **more: Any) -> Arm:
    """Transformers' own decoding. When sampling its noise is another one, so only its speed can be compared."""
    generate: Any = model.generate
    return Arm(name, lambda batch: timed(partial(generate, **more), batch, decoding), not decoding.is_sampled)


def our_arm(name: str, speculator: RecurrentDraftingSpeculator, decoding: Decoding) -> Arm:
    """Ours, without memory: arms and warm-ups answer the same prompts, so it would hold the very replies."""
    speculator = speculator.without_memory()

    def run(batch: Batch) -> Run:
        generate = partial(speculator.generate, seed=decoding.seed, row_ids=batch.row_ids)
        timing = timed(generate, batch, decoding)
        return replace(
            timing, steps=speculator.stats.steps, drafts=speculator.stats.drafts, sources=speculator.stats.sources
        )

    return Arm(name, run)


def timed(generate: Callable[..., Any], batch: Batch, decoding: Decoding) -> Run:
    """Generate one token, then the replies; a clock around each."""
    prompts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    begun = now()
    generate(**prompts, **decoding.arguments(new_tokens=1))
    first = now()
    output = generate(**prompts, **decoding.arguments())
    seconds = now() - first
    ids = [until_end(row, decoding.end_ids) for row in output[:, batch.input_ids.shape[1] :].tolist()]
    return Run(ids, seconds, first - begun)


def shape_name(shape: DraftShape) -> str:
    """``fixed 10x4``, or ``fixed 3x6, 12 nodes``."""
    limit = "" if shape.max_tree_nodes is None else f", {shape.max_tree_nodes} nodes"
    return f"fixed {shape.beam_width}x{shape.beam_length}{limit}"


def lookup_fits(verifier: Verifier, batches: Sequence[Batch], new_tokens: int) -> bool:
    """Whether transformers (5.19) can look up: one prompt at a time, and drafts that may pass the reply's end."""
    rows, longest = batches[0].input_ids.shape[0], max(batch.input_ids.shape[1] for batch in batches)
    context = verifier.context_length
    return rows == 1 and (context is None or longest + new_tokens + LOOKUP_TOKENS <= context)


def standard_arms(
    speculator: RecurrentDraftingSpeculator,
    decoding: Decoding,
    shapes: Sequence[DraftShape],
    *,
    lookup: bool = True,
    assistant: PreTrainedModel | None = None,
) -> list[Arm]:
    """Transformers first, which greedy output is compared with; then autoregression, the base of every ratio.

    ``lookup``: transformers' prompt lookup, which takes one prompt at a time; ours is an arm where the speculator looks
    up. ``assistant``: a smaller model.
    """
    model = speculator.verifier.model
    arms = [hf_arm(HF, model, decoding)]
    if lookup:
        arms.append(hf_arm(LOOKUP, model, decoding, prompt_lookup_num_tokens=LOOKUP_TOKENS))
    if assistant is not None:
        arms.append(hf_arm(ASSISTED, model, decoding, assistant_model=assistant))
    ours = {PLAIN: speculator.without_drafter()}
    if speculator.drafter is not None:
        ours |= {shape_name(shape): speculator.with_shape(shape) for shape in shapes}
        ours[AUTO] = speculator.with_shape(None)
    if speculator.with_shape(None).lookup:
        ours[OUR_LOOKUP] = speculator.without_drafter(lookup=True)
    return [*arms, *(our_arm(name, way, decoding) for name, way in ours.items())]
