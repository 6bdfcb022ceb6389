"""What a training tells its caller, and how the caller asks it to stop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)
Phase = Literal["data", "verifier's own text", "distilling", "targets", "evaluation", "training"]


@dataclass(frozen=True)
class Progress:
    """A sentence for people or, with ``done``, how far a phase is.

    ``total`` is None where the end is not known; ``text`` then is a note beside the count, such as the newest loss.
    """

    phase: Phase
    text: str = ""
    done: float | None = None
    total: float | None = None

    def __str__(self) -> str:
        if self.done is None:
            return self.text
        far = f"{self.done:g}" if self.total is None else f"{self.done / max(self.total, 1e-9):.0%}"
        return f"{self.phase}: {far}  {self.text}".rstrip()


OnProgress = Callable[[Progress], None]
ShouldStop = Callable[[], bool]


def log_progress(progress: Progress) -> None:
    """Log sentences as information, counts for debugging."""
    logger.log(logging.INFO if progress.done is None else logging.DEBUG, "%s", progress)


def never() -> bool:
    """No, do not stop."""
    return False
