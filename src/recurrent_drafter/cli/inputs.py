"""What commands open before they decode: a drafter, prompts, and how replies to them are drawn."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.cli.options.measuring import PromptOptions
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Decoding, at_temperature
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import check_pair, check_tokenizer, load_outline
from recurrent_drafter.models.verifier import Verifier

LONGEST = 512


def open_speculator(
    path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: Mapping[str, Any] | None = None
) -> RecurrentDraftingSpeculator:
    """The drafter at ``path``, a directory or a hub name, attached to the model; all that can be wrong with it is said.

    What is given of a ``shape`` fixes it, the rest being the drafter's own. Raises OSError when there is no drafter or
    it is damaged, ValueError when it belongs to a verifier of another width, vocabulary or tokenizer.
    """
    speculator = RecurrentDraftingSpeculator.from_pretrained(path, verifier=model)
    assert speculator.drafter is not None
    check_tokenizer(path, speculator.drafter.config, tokenizer)
    if shape:
        speculator.shape = replace(speculator.drafter.config.draft_shape, **{"max_tree_nodes": None, **shape})
    return speculator


def open_outline(name: str, drafter: RecurrentDrafter, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A verifier without its weights. Raises ValueError if the drafter, which is at ``path``, is for another."""
    model, tokenizer = load_outline(name)
    verifier = Verifier(model)
    check_pair(drafter.config, verifier.hidden_size, verifier.vocab_size)
    check_tokenizer(path, drafter.config, tokenizer)
    return model, tokenizer


def load_prompts(
    options: PromptOptions, verifier: Verifier, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Tensor]:
    """``count`` prompts (S,), or as many as the options say, all of which leave room for the reply."""
    longest = LONGEST
    if verifier.context_length is not None:
        longest = min(longest, verifier.context_length - options.new_tokens)
        if longest < 1:
            raise ValueError(
                f"--new_tokens is {options.new_tokens}, expected less than the context of {verifier.context_length}"
            )
    name = None if options.dataset_path else options.dataset_name or "demo"
    dialogues = load_dialogues(name, options.dataset_path, "eval" if name else "all").dialogues
    return prompts_from_dialogues(dialogues, tokenizer, count=options.prompts or count, max_length=longest)


def decoding_of(
    asked: PromptOptions, model: PreTrainedModel, sampling: Mapping[str, Any] | None = None, seed: int = 0
) -> Decoding:
    """How replies to these prompts are decoded: through end tokens or up to them."""
    end_ids = () if asked.sustained else as_tuple(model.generation_config.eos_token_id)
    return Decoding(asked.new_tokens, end_ids, sampling or at_temperature(0), seed)
