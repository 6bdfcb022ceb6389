"""Conversations and texts: parsing, sources, token masks (layer 2; only ``sources.py`` may reach the hub)."""

from recurrent_drafter.data.batches import LengthGrouped, ShuffledStream, grouped_order, padding_share
from recurrent_drafter.data.dialogues import DataError, Dialogue, LoadReport, Turn
from recurrent_drafter.data.encode import (
    Encoded,
    EncodeReport,
    TrainExample,
    encode_examples,
    iterate_examples,
    prompts_from_dialogues,
)
from recurrent_drafter.data.questions import Question, load_questions, spread
from recurrent_drafter.data.sources import (
    DATASET_NAMES,
    HAVE_EVALUATION_SET,
    DialogueStream,
    LoadedDialogues,
    Split,
    load_dialogues,
)
from recurrent_drafter.data.templates import VICUNA_TEMPLATE, RefusedError, chat_template_of, encode_prompt

__all__ = [
    "DATASET_NAMES",
    "HAVE_EVALUATION_SET",
    "VICUNA_TEMPLATE",
    "DataError",
    "Dialogue",
    "DialogueStream",
    "EncodeReport",
    "Encoded",
    "LengthGrouped",
    "LoadReport",
    "LoadedDialogues",
    "Question",
    "RefusedError",
    "ShuffledStream",
    "Split",
    "TrainExample",
    "Turn",
    "chat_template_of",
    "encode_examples",
    "encode_prompt",
    "grouped_order",
    "iterate_examples",
    "load_dialogues",
    "load_questions",
    "padding_share",
    "prompts_from_dialogues",
    "spread",
]
