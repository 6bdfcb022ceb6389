"""Trials as JSON lines and back, and what benchmarks show of them: columns, and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_drafter.core.metrics import tokens_by_source
from recurrent_drafter.core.tree import DRAFTER, LOOKUP, VERIFIER
from recurrent_drafter.measure import ruler
from recurrent_drafter.measure.arms import AUTO, HF, PLAIN
from recurrent_drafter.measure.ruler import Estimate, Run, Trial, Verdict

Record = dict[str, Any]
SHOWN_DEPTHS = 4
NONE = float("nan")  # a figure that does not apply; shown as nothing


def run_records(trials: Sequence[Trial]) -> Iterator[Record]:
    """One record for each arm and trial, one for each bug; of replies only their lengths, and tokens by source."""
    for arm in trials[0].runs:
        for number, trial in enumerate(trials):
            counts = tokens_by_source(trial.runs[arm].sources)
            yield run_record(trial, arm, number) | ({"tokens_by_source": counts} if counts else {})
        for where in bugs(trials, arm):
            yield {"kind": "bug", "arm": arm, "where": where}


def run_record(trial: Trial, arm: str, number: int) -> Record:
    run, verdicts = trial.runs[arm], trial.verdicts[arm]
    figures = {"steps": run.steps, "seconds": run.seconds, "first_seconds": run.first_seconds}
    judged = {"outcome": [v.outcome for v in verdicts], "margins": [v.margin for v in verdicts]}
    return {"kind": "run", "arm": arm, "prompt": number, "tokens": list(map(len, run.ids)), **figures, **judged}


def bugs(trials: Sequence[Trial], arm: str) -> Iterator[str]:
    """Where an arm's output differs beyond numeric ties."""
    for number, trial in enumerate(trials):
        for row, judged in enumerate(trial.verdicts[arm]):
            if judged.outcome == ruler.BUG and judged.divergence is not None:
                where = f"prompt {number}, row {row}, token {judged.divergence.position}"
                yield f"{where}, margin {judged.divergence.margin:.2g}"


def trials_of(records: Sequence[Record]) -> list[Trial]:
    """What `run_records` wrote, with drafts and their sources where a record has them."""
    runs: dict[int, dict[str, Run]] = {}
    verdicts: dict[int, dict[str, list[Verdict]]] = {}
    for record in records:
        if record["kind"] == "run":
            number, arm, outcomes = record["prompt"], record["arm"], record["outcome"]
            ids = [range(count) for count in record["tokens"]]  # how many, not which
            seen = record.get("drafts", ()), record.get("sources", ())
            run = Run(ids, record["seconds"], record["first_seconds"], record["steps"], *seen)
            runs.setdefault(number, {})[arm] = run
            margins = record.get("margins", [None] * len(outcomes))  # which older files lack
            verdicts.setdefault(number, {})[arm] = list(map(Verdict, outcomes, margins))
    return [Trial(None, runs[number], verdicts[number]) for number in sorted(runs)]


@dataclass(frozen=True)
class Row:
    """One arm among all trials, and what else is recorded of it."""

    arm: str
    trials: Sequence[Trial]
    records: Sequence[Record] = ()

    @property
    def runs(self) -> list[Run]:
        return [trial.runs[self.arm] for trial in self.trials]

    @property
    def rate(self) -> float:
        """Tokens per second: median over the trials."""
        return float(np.median([run.rate for run in self.runs]))

    @property
    def tokens_per_step(self) -> float:
        return ruler.tokens_per_step(self.trials, self.arm)

    def over(self, base: str, *, decoding_only: bool = False) -> Estimate:
        """How many times as fast as another arm, if that is here."""
        if base == self.arm or base not in self.trials[0].runs:
            return Estimate(NONE)
        return ruler.ratio(self.trials, self.arm, base, decoding_only=decoding_only)

    @cached_property
    def base(self) -> str:
        """The faster baseline: transformers' `generate`, or our autoregression."""
        is_faster = PLAIN in self.trials[0].runs and ruler.ratio(self.trials, PLAIN, HF).value > 1
        return PLAIN if is_faster else HF

    @property
    def first_seconds(self) -> float:
        """Until the first token: median over the trials."""
        return float(np.median([run.first_seconds for run in self.runs]))

    @property
    def sources(self) -> dict[str, int]:
        """How many tokens of the replies each source gave."""
        return tokens_by_source(row for run in self.runs for row in run.sources)

    def share(self, source: int) -> float:
        """Of the replies' tokens, how many come from this source."""
        sources = [one for run in self.runs for row in run.sources for one in row]
        return sources.count(source) / len(sources) if sources else NONE

    def accepted_from(self, source: int) -> list[float]:
        """Of the steps that drafted, how many accepted a token of this source at depth 1, 2, ..."""
        counts, steps = [0] * SHOWN_DEPTHS, 0
        for drafts, sources in (pair for run in self.runs for pair in zip(run.drafts, run.sources, strict=False)):
            place = 1  # the reply's first token is prefill's
            for drafted, accepted in drafts:
                for depth, one in enumerate(sources[place : place + accepted][:SHOWN_DEPTHS]):
                    counts[depth] += one == source
                steps += drafted > 0
                place += accepted + 1
        return [count / steps for count in counts] if steps else []

    @cached_property
    def decoding(self) -> Estimate:
        """Speed over autoregression, prefill and its token left out of both."""
        return self.over(PLAIN, decoding_only=True)

    @property
    def efficiency(self) -> float:
        """Speed-up of decoding for each token per step: 1 would be a tree that costs what one token does."""
        return self.decoding.value / self.tokens_per_step

    @property
    def attainable(self) -> float:
        """The best speed-up of decoding that the arm's drafts could give."""
        return self.recorded("limit", "speedup")

    @property
    def fraction(self) -> float:
        return self.decoding.value / self.attainable

    @property
    def over_best_fixed(self) -> Estimate:
        """`auto` over the fixed shape that is fastest here."""
        fixed = [arm for arm in self.trials[0].runs if arm.startswith("fixed")]
        if self.arm != AUTO or not fixed:
            return Estimate(NONE)
        return self.over(max(fixed, key=lambda arm: ruler.ratio(self.trials, arm, PLAIN).value))

    @property
    def verdicts(self) -> list[Verdict]:
        return ruler.verdicts_on(self.trials, self.arm)

    @property
    def is_reference(self) -> bool:
        """Whether the others' output was held against this arm's."""
        judged = self.trials[0].verdicts
        return self.arm == next((arm for arm, rows in judged.items() if rows[0].outcome != ruler.NOT_COMPARED), None)

    def recorded(self, kind: str, name: str) -> float:
        """A figure of the arm's own record of some kind, if there is one."""
        own = (record for record in self.records if record["kind"] == kind and record["arm"] == self.arm)
        return float(next(own, {name: NONE})[name])


def rows_of(trials: Sequence[Trial], records: Sequence[Record] = ()) -> list[Row]:
    return [Row(arm, trials, records) for arm in trials[0].runs]


def recorded_rows(records: Sequence[Record]) -> list[Row]:
    """The rows of a file's lines, the first of which says what was measured."""
    return rows_of(trials_of(records), records)


def figure(value: float, form: str = ".2f") -> str:
    """A number, or nothing where there is none."""
    return f"{value:{form}}" if value == value else ""


def prompts(row: Row) -> str:
    """How many, and how many together."""
    count, batch = row.records[0]["effort"]["prompts"], row.records[0]["batch"]
    return f"{count} x {batch}" if batch > 1 else str(count)


Shown = Mapping[str, Any]  # titles to functions of a row
ARMS: Shown = {
    "arm": lambda row: row.arm,
    "tokens/s": lambda row: f"{row.rate:.1f}",
    "tokens/step": lambda row: figure(row.tokens_per_step),
    "vs HF": lambda row: f"{row.over(HF):.2f}",
    "vs autoregression": lambda row: f"{row.over(PLAIN):.2f}",
    "decoding only": lambda row: f"{row.decoding:.2f}",
    "of tokens/step": lambda row: figure(row.efficiency),
    "attainable": lambda row: figure(row.attainable),
    "fraction": lambda row: figure(row.fraction),
    "vs best fixed": lambda row: f"{row.over_best_fixed:.2f}",
    "identical": lambda row: ruler.verdict(row.verdicts),
}
CELLS: Shown = {"cell": lambda row: row.records[0]["name"], **ARMS}
NARROW: Shown = {  # of the terminal, whose 80 columns hold no more
    "": ARMS["arm"],
    "tok/s": ARMS["tokens/s"],
    "tok/\nstep": ARMS["tokens/step"],
    "vs HF": ARMS["vs HF"],
    "vs autoregr.": ARMS["vs autoregression"],
    "decoding\nonly": lambda row: figure(row.decoding.value),
    "identical": lambda row: "" if row.is_reference else ARMS["identical"](row),
}
TASKS: Shown = {  # a row's record names its kind of task
    "task": CELLS["cell"],
    "arm": ARMS["arm"],
    "tok/s": ARMS["tokens/s"],
    "tok/\nstep": ARMS["tokens/step"],
    "vs faster\nbaseline": lambda row: f"{row.over(row.base):.2f}",
    "first\ntoken": lambda row: f"{row.first_seconds:.2f} s",
    "identical": NARROW["identical"],
}


def by_depth(row: Row, source: int) -> str:
    """In percent: of the replies' tokens, and of the steps at each depth."""
    depths = " ".join(f"{100 * share:.0f}" for share in row.accepted_from(source))
    return f"{row.share(source):.0%}: {depths}" if row.share(source) else ""


SOURCES: Shown = {  # whose tokens the replies are made of, and how deep drafts were right
    "task": CELLS["cell"],
    "arm": ARMS["arm"],
    "own": lambda row: figure(row.share(VERIFIER), ".0%"),
    "drafter's at\ndepth 1, 2, ...": lambda row: by_depth(row, DRAFTER),
    "lookup's at\ndepth 1, 2, ...": lambda row: by_depth(row, LOOKUP),
}
OVERVIEW: Shown = {  # of `auto` in every cell
    "cell": CELLS["cell"],
    "prompts": prompts,
    "autoregression vs HF": lambda row: f"{Row(PLAIN, row.trials).over(HF):.2f}",
    **{name: ARMS[name] for name in ("tokens/step", "vs HF", "vs autoregression", "decoding only")},
    **{name: ARMS[name] for name in ("fraction", "vs best fixed")},
    "overhead": lambda row: figure(row.recorded("profile", "overhead"), ".1%"),
    "MiB beyond": lambda row: figure(row.recorded("memory", "beyond"), ".0f"),
}


def inner_markdown(records: Sequence[Record]) -> str:
    """Profile and memory of one cell; empty where they were not measured."""
    said = {"profile": profile_line, "memory": memory_line}
    inner = [record for record in records if record["kind"] in said]
    return "".join(f"- {records[0]['name']}, {one['arm']}: {said[one['kind']](one)}\n" for one in inner)


def profile_line(record: Record) -> str:
    stages = ", ".join(f"{name} {ms:.2f} ms ({share:.0%})" for name, ms, share in record["stages"])
    return f"{stages}; outside verification and drafting {record['overhead']:.1%}"


def memory_line(mebibytes: dict[str, float]) -> str:
    return (
        "{beyond:.0f} MiB beyond model ({model:.0f}), drafter ({drafter:.0f}) and key-value cache ({cache:.0f}): "
        "packed weights {packed:.0f}, working tensors {working:.0f}"
    ).format(**mebibytes)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed over autoregression of every arm in every cell, with intervals; one panel for each model.

    Raises ValueError when matplotlib, of the extra ``report``, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install 'recurrent-drafter[report]'") from error
    models: dict[str, dict[str, list[Row]]] = {}  # their rows by cell
    for row in rows:
        model, cell = row.records[0]["name"].split("/", 1)
        models.setdefault(model, {}).setdefault(cell, []).append(row)
    if not models:
        return
    figure = Figure(figsize=(11, 4 * len(models)), layout="tight")
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for panel, (model, cells) in zip(panels, models.items(), strict=True):
        arms = list(dict.fromkeys(row.arm for own in cells.values() for row in own if row.arm != PLAIN))
        for place, arm in enumerate(arms):
            shown = {x: row.over(PLAIN) for x, own in enumerate(cells.values()) for row in own if row.arm == arm}
            x = [number + 0.8 * (place + 0.5) / len(arms) - 0.4 for number in shown]
            reach = list(zip(*(ratio.reach for ratio in shown.values()), strict=True))
            middles = [ratio.value for ratio in shown.values()]
            panel.errorbar(x, middles, yerr=reach, fmt="o", markersize=4, linewidth=1, label=arm)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(cells)), list(cells), rotation=30, ha="right")
        panel.set_ylabel("tokens/s over autoregression")
        panel.set_title(f"{model}: medians and 95 % intervals, prefill included")
        panel.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
