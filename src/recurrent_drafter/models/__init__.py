"""The drafter and the verifier: alone knows Hugging Face models. Importing it registers both with the Auto classes."""

from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter

__all__ = ["DraftShape", "RecurrentDrafter", "RecurrentDraftingConfig"]
