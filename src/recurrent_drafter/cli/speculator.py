"""One way to open a drafter for every command: all that can be wrong with it is said here."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import check_tokenizer, load_drafter
from recurrent_drafter.models.verifier import Verifier


def open_speculator(
    path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter at ``path``, a directory or a hub name, attached to the model.

    Raises OSError when there is none or it is damaged, ValueError when it belongs to a verifier of another width,
    vocabulary or tokenizer.
    """
    speculator = RecurrentDraftingSpeculator.from_pretrained(path, verifier=model)
    assert speculator.drafter is not None
    check_tokenizer(path, speculator.drafter.config, tokenizer)
    return speculator


def open_drafter(path: str, verifier: Verifier, tokenizer: PreTrainedTokenizerBase) -> RecurrentDrafter:
    """The drafter alone, in float32 as it is trained. Raises as `open_speculator` does."""
    open_speculator(path, verifier.model, tokenizer)
    return load_drafter(path, dtype=torch.float32).to(verifier.device)  # type: ignore[arg-type]
