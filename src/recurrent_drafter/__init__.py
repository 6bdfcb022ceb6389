"""Recurrent drafting: faster generation from any causal language model, with not a token changed.

The names load on first use: `import recurrent_drafter` alone costs neither torch nor transformers, and registers
nothing. `import recurrent_drafter.models` makes drafters known to transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
    from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
    from recurrent_drafter.models.drafter import RecurrentDrafter
    from recurrent_drafter.training.arguments import TrainingArguments

_PLACES = {
    "DraftShape": "models.config",
    "RecurrentDrafter": "models.drafter",
    "RecurrentDraftingConfig": "models.config",
    "RecurrentDraftingSpeculator": "decoding.speculator",
    "TrainingArguments": "training.arguments",
}
__all__ = [
    "DraftShape",
    "RecurrentDrafter",
    "RecurrentDraftingConfig",
    "RecurrentDraftingSpeculator",
    "TrainingArguments",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
