"""Training a drafter, as a library.

The names here load on first use, so that importing `recurrent_drafter.training.options` costs neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurrent_drafter.training.arguments import TrainingArguments
    from recurrent_drafter.training.callbacks import Progress
    from recurrent_drafter.training.estimation import TrainingEstimate
    from recurrent_drafter.training.pipeline import TrainedDrafter, estimate, evaluate, train

__all__ = ["Progress", "TrainedDrafter", "TrainingArguments", "TrainingEstimate", "estimate", "evaluate", "train"]
_PLACES = {"Progress": "callbacks", "TrainingArguments": "arguments", "TrainingEstimate": "estimation"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'pipeline')}"), name)


def __dir__() -> list[str]:
    return __all__
