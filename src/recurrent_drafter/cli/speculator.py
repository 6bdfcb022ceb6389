"""One way to open a drafter for every command: all that can be wrong with it is said here."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.loading import check_tokenizer


def open_speculator(
    base_model: str, path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter at ``path``, a directory or a hub name, attached to the model; for ``demo`` the bundled one without.

    Raises OSError when there is none or it is damaged, ValueError when none is named or it belongs to a verifier of
    another width, vocabulary or tokenizer.
    """
    path = drafter_path(base_model, path)
    speculator = RecurrentDraftingSpeculator.from_pretrained(path, verifier=model)
    assert speculator.drafter is not None
    check_tokenizer(path, speculator.drafter.config, tokenizer)
    return speculator


def drafter_path(base_model: str, path: str | None) -> str:
    """Where the drafter is: as named, or for ``demo`` the bundled one. Raises as `open_speculator` does."""
    if path is None:
        if base_model != "demo":
            raise ValueError(
                f"no drafter is named for {base_model}: give --speculator_path, train one with "
                f"train_speculator.py --llm_name_or_path {base_model}, or use generate_speculator.py --autoregressive"
            )
        path = str(demo_drafter_path())
    return path
