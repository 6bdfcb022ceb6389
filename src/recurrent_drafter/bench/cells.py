"""What the engine's benchmark varies: one factor at a time from a base cell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

DEMO = "demo"
BATCHES, CONTEXTS, TEMPERATURES = (2, 4, 8, 16), (64, 512, 896), (0.7, 1.0)
HIT_RATES = (0.0, 0.3, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class BenchCell:
    """One combination: every arm runs on the same prompts of exactly ``context`` tokens, ``batch`` at a time.

    ``hit_rate``: of an oracle drafter; None is the model's trained one.
    """

    name: str
    model: str
    dtype: str
    batch: int = 1
    context: int = 128
    temperature: float = 0.0
    hit_rate: float | None = None


def all_cells(models: Sequence[str], base_dtype: str) -> list[BenchCell]:
    """The grid: for the demo model its factors, for a shape every hit rate in both dtypes."""
    dtypes = sorted(("float32", "bfloat16"), key=lambda dtype: dtype != base_dtype)
    cells: list[BenchCell] = []
    for model in models:
        if model != DEMO:
            cells += [
                BenchCell(f"{model}/{dtype}/oracle-{rate:g}", model, dtype, hit_rate=rate)
                for dtype in dtypes
                for rate in HIT_RATES
            ]
            continue
        base = BenchCell(f"{DEMO}/base", DEMO, base_dtype)
        cells += [base, replace(base, name=f"{DEMO}/{dtypes[1]}", dtype=dtypes[1])]
        cells += [replace(base, name=f"{DEMO}/batch-{count}", batch=count) for count in BATCHES]
        cells += [replace(base, name=f"{DEMO}/context-{length}", context=length) for length in CONTEXTS]
        cells += [replace(base, name=f"{DEMO}/temperature-{heat:g}", temperature=heat) for heat in TEMPERATURES]
    return cells


def selected(cells: Sequence[BenchCell], patterns: Sequence[str]) -> list[BenchCell]:
    """Those whose name one of the shell patterns matches. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell matches {pattern!r}, expected a name or pattern among those that --list shows")
    return [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in patterns)]
