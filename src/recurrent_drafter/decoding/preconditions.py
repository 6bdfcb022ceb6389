"""What a request must be like before decoding starts: everything is refused here, by name."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import REFUSED, Sampler
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

# What transformers hands to a decoding method besides the prompt; anything else a user has asked for.
USUAL_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def check_ids(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for prompts that are not integers (B, S), or a mask of another shape."""
    kind = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids are {kind}: expected integers of shape (batch, length)")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is of shape {tuple(attention_mask.shape)}, and input_ids are {kind}")


def check(
    verifier: Verifier,
    config: GenerationConfig,
    state: GenerationState,
    sampler: Sampler,
    arguments: dict[str, Any],
) -> None:
    """Raise ValueError for a request that cannot be decoded exactly, whatever drafts."""
    refuse_unsupported(config, sampler, arguments)
    check_prompt(state, verifier.context_length)
    check_padding(state.prompts, arguments.get("attention_mask"), arguments.get("position_ids"))


def check_prompt(state: GenerationState, context_length: int | None) -> None:
    """Raise ValueError for prompts that are empty or do not leave room for the reply."""
    batch, length = state.prompts.shape
    if batch == 0 or length == 0:
        raise ValueError(f"the prompts are of shape ({batch}, {length}): expected at least one with one token")
    if state.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {state.max_new_tokens}, expected at least 1")
    if context_length is not None and length + state.max_new_tokens > context_length:
        raise ValueError(
            f"a prompt of {length} tokens and {state.max_new_tokens} new ones exceed the context of {context_length}: "
            f"shorten the prompt, or ask for at most {max(context_length - length, 0)} new tokens"
        )


def check_drafter(drafter: RecurrentDrafter, shape: DraftShape | None, verifier: Verifier, prompt_length: int) -> None:
    """Raise ValueError when the drafter was moved away from the verifier, or the shape does not fit."""
    weight = next(drafter.parameters())
    if (weight.device, weight.dtype) != (verifier.device, verifier.model.dtype):
        raise ValueError(
            f"the drafter is {weight.dtype} on {weight.device}, the verifier {verifier.model.dtype} on "
            f"{verifier.device}: expected the same; attach_verifier(model) moves the drafter"
        )
    if shape is None:
        return
    if shape.beam_width > (most := drafter.config.draft_vocab_size):
        raise ValueError(f"beam_width is {shape.beam_width}, expected 1 to {most} (the draft vocabulary)")
    if verifier.context_length is not None and shape.beam_length >= (left := verifier.context_length - prompt_length):
        raise ValueError(
            f"beam_length is {shape.beam_length}, expected at most {left - 1}: the prompt leaves {left} "
            f"tokens of the context of {verifier.context_length}"
        )


def check_padding(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Raise ValueError for prompts that end in a pad, which the reply would follow, and for positions of one's own."""
    own = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if position_ids is not None and ((own.cumsum(1) - 1 != position_ids) & own.bool()).any():
        raise ValueError("position_ids other than those of the prompts' tokens are not supported: leave them out")
    padded = (own[:, -1] == 0).nonzero()[:, 0].tolist()
    if padded:
        raise ValueError(
            f"row {padded[0]} of the prompts ends in a pad: expected padding on the left (padding_side='left') and at "
            "least one token in each row"
        )


def check_conversation(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for more than one prompt, or a padded one, with a session."""
    batch, _ = input_ids.shape
    pads = 0 if attention_mask is None else int((attention_mask == 0).sum())
    if batch > 1 or pads > 0:
        raise ValueError(
            f"a session is one conversation: expected one prompt without pads, not {batch} with {pads} pads"
        )


def refuse_unsupported(config: GenerationConfig, sampler: Sampler, arguments: dict[str, Any]) -> None:
    """Raise ValueError, by name, for what this loop cannot do exactly."""
    mode = config.get_generation_mode()
    names = [
        f"{name}=True"
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "token_healing")
        if getattr(config, name, None)
    ]
    if (config.num_beams or 1) > 1:
        names.append(f"num_beams={config.num_beams}")
    elif mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        names.append(f"the generation mode {mode.value!r}")
    names += [f"the logits processor {type(p).__name__}" for p in sampler.processors if isinstance(p, REFUSED)]
    cache = arguments.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        names.append("past_key_values")
    names += [name for name in arguments if name not in USUAL_ARGUMENTS and arguments[name] is not None]
    if names:
        raise ValueError(
            f"not supported when decoding with a drafter: {', '.join(names)} (greedy search and sampling are)"
        )
