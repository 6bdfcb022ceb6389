"""The picture of a benchmark's table; needs matplotlib, which the extra ``report`` brings."""

from collections.abc import Sequence
from pathlib import Path

from recurrent_drafter.bench.columns import Row
from recurrent_drafter.measure.arms import PLAIN


def cell(row: Row) -> str:
    return str(row.records[0]["name"])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed over autoregression of every arm in every cell, with intervals; one panel for each model.

    Raises ValueError when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install 'recurrent-drafter[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(cell(row).split("/")[0] for row in rows))
    if not models:
        return
    figure, panels = pyplot.subplots(len(models), 1, figsize=(11, 4 * len(models)), squeeze=False)
    for panel, model in zip(panels[:, 0], models, strict=True):
        own = [row for row in rows if cell(row).split("/")[0] == model]
        cells = list(dict.fromkeys(cell(row) for row in own))
        arms = list(dict.fromkeys(row.arm for row in own if row.arm != PLAIN))
        for place, arm in enumerate(arms):
            shown = [row for row in own if row.arm == arm]
            x = [cells.index(cell(row)) + 0.8 * (place + 0.5) / len(arms) - 0.4 for row in shown]
            ratios = [row.over(PLAIN) for row in shown]
            reach = list(zip(*(ratio.reach for ratio in ratios), strict=True))
            middles = [ratio.value for ratio in ratios]
            panel.errorbar(x, middles, yerr=reach, fmt="o", markersize=4, linewidth=1, label=arm)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(cells)), [cell.split("/", 1)[1] for cell in cells], rotation=30, ha="right")
        panel.set_ylabel("tokens/s over autoregression")
        panel.set_title(f"{model}: medians and 95 % intervals, prefill included")
        panel.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
