"""Figures that others have published, to stand beside measured ones.

Grades: P, read in the primary source; S, from a secondary one. None of them was measured on the same model, data or
hardware as ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Speed over autoregression and tokens per step, as published."""

    what: str
    speedup: float
    tokens_per_step: float
    where: str
    grade: str


VICUNA = "Vicuna 7B, H100, greedy"
MAIN: Sequence[Figure] = (
    Figure("ReDrafter, MT-Bench", 2.80, 4.20, VICUNA, "S"),
    Figure("ReDrafter, AlpacaEval", 2.69, 4.06, VICUNA, "S"),
    Figure("ReDrafter, MT-Bench", 2.80, 4.21, "Vicuna 13B, H100, greedy", "S"),
    Figure("ReDrafter, MT-Bench", 2.61, 3.87, "Vicuna 33B, H100, greedy", "S"),
    Figure("EAGLE, MT-Bench", 2.69, 3.96, VICUNA, "S"),
    Figure("Medusa, MT-Bench", 2.39, 2.55, VICUNA, "S"),
    Figure("EAGLE-2, Spec-Bench", 2.36, 4.34, "7B, A100, greedy, batch 1", "P"),
    Figure("EAGLE, Spec-Bench", 2.10, 3.58, "7B, A100, greedy, batch 1", "P"),
    Figure("Hydra, Spec-Bench", 2.07, 3.26, "7B, A100, greedy, batch 1", "P"),
    Figure("Medusa, Spec-Bench", 1.71, 2.31, "7B, A100, greedy, batch 1", "P"),
    Figure("prompt lookup, Spec-Bench", 1.66, 1.75, "7B, A100, greedy, batch 1", "P"),
    Figure("small-model drafting, Spec-Bench", 1.52, 2.28, "7B, A100, greedy, batch 1", "P"),
)


@dataclass(frozen=True)
class DistillationGain:
    """The paper's ablation: tokens per step and speed-up without distillation, and with it."""

    beam_width: int
    tokens_per_step: tuple[float, float]
    speedup: tuple[float, float]

    @property
    def gain(self) -> float:
        return self.tokens_per_step[1] / self.tokens_per_step[0]


DISTILLATION: Sequence[DistillationGain] = (  # Vicuna 7B; grade S
    DistillationGain(16, (2.87, 3.09), (1.80, 1.92)),
    DistillationGain(64, (3.30, 3.58), (1.99, 2.18)),
)
TREE_SAVES = (0.30, 0.60)  # of the tokens to verify; grade S
BEST_WIDTH = "1 on an M1 Max, 3 on an M2 Ultra, 50 and more on A100 and H100; length 4 to 5"  # grade S
APPLE_MLX = "1.37 on an M1 Max, 1.68 on an M2, 1.52 on an M2 Ultra; a badly chosen shape gives 0.75"  # grade P
# FR-Spec, Llama-3 8B: draft vocabulary, accepted length, speed-up; grade P.
VOCABULARY = ((128, 3.89, 2.03), (64, 3.80, 2.21), (32, 3.63, 2.27), (16, 3.40, 2.21), (8, 3.13, 2.09))
