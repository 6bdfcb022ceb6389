"""The prompts that `verify` and `tune` decode."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.cli.options.measuring import PromptOptions
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure.arms import Decoding, at_temperature
from recurrent_drafter.models.verifier import Verifier

LONGEST = 512


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
    config: Any = model.generation_config
    end_ids = () if asked.sustained else as_tuple(config.eos_token_id)
    return Decoding(asked.new_tokens, end_ids, sampling or at_temperature(0), seed)
