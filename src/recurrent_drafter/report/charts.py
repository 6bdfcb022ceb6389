"""Drawings of findings: intervals, curves and maps (with matplotlib, of the ``report`` extra)."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.measure.tuning import Grid
from recurrent_drafter.records.paths import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "no picture is drawn, because matplotlib is not installed: pip install 'recurrent-drafter[report]'"
COLORS = ("#4c6a92", "#d98f3e", "#3f8f6b", "#a2506b", "#7a6bb0", "#8a8f45")  # told apart in gray, too


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def svg(figure: "Figure") -> bytes:
    """The drawing, with its words as words, the same bytes every time."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "recurrent-drafter"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def intervals(groups: Mapping[str, Mapping[str, Estimate]], label: str) -> bytes:
    """Points with their intervals: groups below each other, their members in colors."""
    from matplotlib.figure import Figure

    members = list(dict.fromkeys(member for group in groups.values() for member in group))
    figure = Figure(figsize=(7.5, 1.2 + 0.24 * sum(len(group) + 1 for group in groups.values())), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, []
    for group in groups.values():
        ticks.append(place + (len(group) - 1) / 2)
        for member, estimate in group.items():
            color = COLORS[members.index(member) % len(COLORS)]
            reach = [[end] for end in estimate.reach]
            named = any(member == text for text in axes.get_legend_handles_labels()[1])
            axes.errorbar(
                estimate.value, place, xerr=reach, fmt="o", color=color, capsize=2, label=None if named else member
            )
            place += 1
        place += 1
    axes.set_yticks(ticks, list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.4)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return svg(figure)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, *, logarithmic: bool = False) -> bytes:
    """Curves; names that are the same up to a ``#`` share a color and one entry in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(name.partition("#")[0] for name in series))
    for name, points in series.items():
        kind = name.partition("#")[0]
        named = any(kind == text for text in axes.get_legend_handles_labels()[1])
        xs, ys = zip(*points, strict=True)
        color = COLORS[kinds.index(kind) % len(COLORS)]
        axes.plot(xs, ys, marker="o", markersize=3, linewidth=1.3, color=color, label=None if named else kind)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel=x, ylabel=y)
    axes.grid(linewidth=0.4)
    axes.legend(frameon=False, fontsize=9)
    return svg(figure)


def draw_speed_maps(path: Path, grids: dict[str, Grid], title: str) -> None:
    """Speed-up for each title of ``grids``, as a PNG file."""
    figure = heat_maps(grids, title, "speed over autoregression (predicted)")
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


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
