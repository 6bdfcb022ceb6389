"""The model and the drafter that a command decodes with."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.cli.options.decoding import lookup_alone
from recurrent_drafter.cli.progress import Meter
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.loading import check_tokenizer
from recurrent_drafter.models.packed_linear import pack


def open_speculator(
    path: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: Mapping[str, Any] | None = None,
    *,
    lookup: bool | None = None,
    packed: bool = True,
) -> RecurrentDraftingSpeculator:
    """The drafter at ``path``, a directory or a hub name, attached to the model; all that can be wrong with it is said.

    Without a path it is lookup alone, which is said. What is given of a ``shape`` fixes it, the rest being the
    drafter's own; lookup then is off unless it is asked for. ``packed``: as `attach_verifier` has it. Raises OSError
    when there is no drafter or it is damaged, ValueError when it belongs to a verifier of another width, vocabulary or
    tokenizer.
    """
    if path is None:
        print(lookup_alone(str(model.name_or_path)), file=sys.stderr)
        speculator = RecurrentDraftingSpeculator(lookup=lookup)
        speculator.attach_verifier(model, packed=packed)
        return speculator
    speculator = RecurrentDraftingSpeculator.from_pretrained(path)
    speculator.attach_verifier(model, packed=packed)
    assert speculator.drafter is not None
    check_tokenizer(path, speculator.drafter.config, tokenizer)
    if shape:
        speculator.shape = replace(speculator.drafter.config.draft_shape, **{"max_tree_nodes": None, **shape})
    return speculator if lookup is None else speculator.with_lookup(lookup)


def pack_weights(model: PreTrainedModel) -> None:
    """Put packed weights in the place of the model's own, showing how far that is."""
    with Meter("packing weights", unit="layers") as meter:
        pack(model, meter.update)
