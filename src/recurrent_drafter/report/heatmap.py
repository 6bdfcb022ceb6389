"""A figure over beam width and length, as a picture (needs matplotlib, of the ``report`` extra)."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from recurrent_drafter.measure.tuning import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "no picture is drawn, because matplotlib is not installed: pip install 'recurrent-drafter[report]'"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_speed_maps(path: Path, grids: dict[str, Grid], title: str) -> None:
    """Speed-up for each title of ``grids``, as a PNG file."""
    unfinished = path.with_name(path.name + ".tmp")
    figure = heat_maps(grids, title, "speed over autoregression (predicted)")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)


def heat_maps(grids: dict[str, Grid], title: str, label: str) -> "Figure":
    """One map for each title of ``grids``: beam width to the right, length upwards, the figure in every cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.2 * len(grids), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    highest = max(max(grid.values()) for grid in grids.values())
    lowest = min(min(grid.values()) for grid in grids.values())
    for axes, (name, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        widths, lengths = (sorted({cell[side] for cell in grid}) for side in (0, 1))
        rows = [[grid[width, length] for width in widths] for length in lengths]
        image = axes.imshow(rows, origin="lower", aspect="auto", cmap="viridis", vmin=lowest, vmax=highest)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = value < (lowest + highest) / 2
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        axes.set(title=name, xlabel="beam width", ylabel="beam length")
        axes.set_xticks(range(len(widths)), map(str, widths))
        axes.set_yticks(range(len(lengths)), map(str, lengths))
    figure.colorbar(image, ax=figure.axes, label=label)
    return figure
