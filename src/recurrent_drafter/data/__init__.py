"""Conversations and texts: parsing, sources, token masks (layer 2; only ``sources.py`` may reach the hub)."""

from recurrent_drafter.data.dialogues import DataError, Dialogue, LoadReport, Turn
from recurrent_drafter.data.encode import (
    EncodeReport,
    TrainExample,
    encode_examples,
    prompts_from_dialogues,
)
from recurrent_drafter.data.sources import DATASET_NAMES, LoadedDialogues, Split, load_dialogues
from recurrent_drafter.data.template import VICUNA_TEMPLATE, RefusedError, chat_template_of, encode_prompt

__all__ = [
    "DATASET_NAMES",
    "VICUNA_TEMPLATE",
    "DataError",
    "Dialogue",
    "EncodeReport",
    "LoadReport",
    "LoadedDialogues",
    "RefusedError",
    "Split",
    "TrainExample",
    "Turn",
    "chat_template_of",
    "encode_examples",
    "encode_prompt",
    "load_dialogues",
    "prompts_from_dialogues",
]
