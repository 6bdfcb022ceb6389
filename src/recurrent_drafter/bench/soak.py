"""Generation without end: neither memory nor the time of a step may grow."""

import gc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_drafter.bench.memory import MIB, resident
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Decoding
from recurrent_drafter.measure.ruler import now


@dataclass
class Soak:
    """One entry for each generation: seconds per step, and resident bytes after it."""

    tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    @property
    def memory_growth(self) -> int:
        """Bytes between the second fifth and the last one, medians: the first fifth fills pools and caches."""
        fifths = np.array_split(np.asarray(self.resident), 5)
        return int(np.median(fifths[4]) - np.median(fifths[1]))

    @property
    def time_growth(self) -> float:
        """Seconds per step in the last fifth over those in the second one, medians."""
        fifths = np.array_split(np.asarray(self.step_seconds), 5)
        return float(np.median(fifths[4]) / np.median(fifths[1]))

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "generations": len(self.resident),
            "step_ms": 1e3 * float(np.median(self.step_seconds)),
            "time_growth": self.time_growth,
            "memory_growth_mib": self.memory_growth / MIB,
        }


def soak(speculator: RecurrentDraftingSpeculator, prompt: Tensor, tokens: int, decoding: Decoding) -> Soak:
    """Generate ``tokens`` tokens after a prompt (S,), each prompt being the last S tokens of all that came before.

    Lengths are the same in every generation, so that times can be compared; prefill's share is within them. Raises
    ValueError when ``tokens`` are fewer than five generations, which growth is read from.
    """
    if tokens < 5 * decoding.new_tokens:
        raise ValueError(f"{tokens} tokens are asked for, expected at least five times {decoding.new_tokens}")
    result = Soak()
    (length,) = prompt.shape
    text = prompt[None].to(speculator.verifier.device)
    while result.tokens < tokens:
        begun = now()
        output = speculator.generate(text, torch.ones_like(text), **decoding.arguments())
        seconds = now() - begun
        assert isinstance(output, Tensor)
        result.tokens += output.shape[1] - length
        result.step_seconds.append(seconds / max(speculator.stats.steps, 1))
        text = output[:, -length:].clone()
        del output
        gc.collect()
        result.resident.append(resident())
    return result
