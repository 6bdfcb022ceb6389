"""Recurrent drafting: faster generation from any causal language model, with not a token changed."""

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.training.arguments import TrainingArguments

__all__ = [
    "DraftShape",
    "RecurrentDrafter",
    "RecurrentDraftingConfig",
    "RecurrentDraftingSpeculator",
    "TrainingArguments",
]
__version__ = "0.1.0"
