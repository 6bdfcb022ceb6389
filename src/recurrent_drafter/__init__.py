"""Recurrent drafting: faster generation from any causal language model, with not a token changed."""

from recurrent_drafter.arguments import TrainingArguments
from recurrent_drafter.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.speculator import RecurrentDraftingSpeculator

__all__ = [
    "DraftShape",
    "RecurrentDrafter",
    "RecurrentDraftingConfig",
    "RecurrentDraftingSpeculator",
    "TrainingArguments",
]
__version__ = "0.1.0"
