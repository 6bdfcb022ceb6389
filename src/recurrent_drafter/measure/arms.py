"""The ways of generating that are compared, all through transformers' own `generate`."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.comparison import Arm, Batch, Decoding
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.verifier import Verifier

NEVER = -1  # an end token that no vocabulary has: generation goes on
LOOKUP_TOKENS = 10  # what transformers' documentation takes for prompt lookup
HF, PLAIN, LOOKUP, ASSISTED, AUTO = "HF generate", "autoregression", "HF prompt lookup", "HF assisted", "auto"


def options(decoding: Decoding, new_tokens: int) -> dict[str, Any]:
    """The same arguments of `generate` for every arm; temperature is the only warper."""
    chosen: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "eos_token_id": list(decoding.end_ids) or [NEVER],
        "pad_token_id": 0,
        "do_sample": decoding.temperature > 0,
    }
    return chosen | ({"temperature": decoding.temperature, "top_k": 0, "top_p": 1.0} if decoding.temperature else {})


def hf_arm(name: str, model: PreTrainedModel, decoding: Decoding, **more: Any) -> Arm:
    """Transformers' own decoding. When sampling its noise is another one, so only its speed can be compared."""

    def generate(batch: Batch, new_tokens: int) -> tuple[Tensor, None]:
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options(decoding, new_tokens), **more
        )
        return output[:, batch.input_ids.shape[1] :], None

    return Arm(name, generate, is_compared=decoding.temperature == 0)


def our_arm(name: str, speculator: RecurrentDraftingSpeculator, decoding: Decoding) -> Arm:
    """This package's decoding; each batch has a seed of its own, the same in every arm."""

    def generate(batch: Batch, new_tokens: int) -> tuple[Tensor, int]:
        output = speculator.generate(
            batch.input_ids,
            batch.attention_mask,
            seed=decoding.seed + batch.number,
            **options(decoding, new_tokens),
        )
        assert isinstance(output, Tensor)
        return output[:, batch.input_ids.shape[1] :], speculator.stats.steps

    return Arm(name, generate)


def variant(speculator: RecurrentDraftingSpeculator, shape: DraftShape | None) -> RecurrentDraftingSpeculator:
    """The same drafter and verifier, their packed weights shared, at another shape."""
    other = copy.copy(speculator)
    other.shape = shape
    return other


def without_drafter(speculator: RecurrentDraftingSpeculator) -> RecurrentDraftingSpeculator:
    """Plain autoregression in the same loop, on the same verifier."""
    other = variant(speculator, None)
    other.drafter = None
    return other


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

    ``lookup``: transformers' prompt lookup, which takes one prompt at a time. ``assistant``: a smaller model.
    """
    model = speculator.verifier.model
    arms = [hf_arm(HF, model, decoding)]
    if lookup:
        arms.append(hf_arm(LOOKUP, model, decoding, prompt_lookup_num_tokens=LOOKUP_TOKENS))
    if assistant is not None:
        arms.append(hf_arm(ASSISTED, model, decoding, assistant_model=assistant))
    arms.append(our_arm(PLAIN, without_drafter(speculator), decoding))
    arms += [our_arm(shape_name(shape), variant(speculator, shape), decoding) for shape in shapes]
    return [*arms, our_arm(AUTO, variant(speculator, None), decoding)]
