"""Training a drafter, as a library.

The names here load on first use, so that importing `recurrent_drafter.training.options` costs neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurrent_drafter.training.arguments import TrainingArguments

_PLACES = {"TrainingArguments": "arguments"}
__all__ = ["TrainingArguments"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
