"""One way to open a drafter for every command: all that can be wrong with it is said here."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.loading import check_tokenizer


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
