"""Trials as JSON lines and back, and the columns that benchmarks show of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from recurrent_drafter.measure.arms import AUTO, HF, PLAIN
from recurrent_drafter.measure.ruler import (
    BUG,
    NOT_COMPARED,
    Estimate,
    Run,
    Trial,
    Verdict,
    ratio,
    tokens_per_step,
    verdict,
)

Record = dict[str, Any]
NONE = float("nan")  # a figure that does not apply; shown as nothing


def run_records(trials: Sequence[Trial]) -> Iterator[Record]:
    """One record for each arm and trial, one for each bug; of replies only their lengths."""
    for arm in trials[0].runs:
        for number, trial in enumerate(trials):
            run, verdicts = trial.runs[arm], trial.verdicts[arm]
            figures = {"steps": run.steps, "seconds": run.seconds, "first_seconds": run.first_seconds}
            judged = {"outcome": [v.outcome for v in verdicts], "margins": [v.margin for v in verdicts]}
            yield {"kind": "run", "arm": arm, "prompt": number, "tokens": list(map(len, run.ids)), **figures, **judged}
        for where in bugs(trials, arm):
            yield {"kind": "bug", "arm": arm, "where": where}


def bugs(trials: Sequence[Trial], arm: str) -> Iterator[str]:
    """Where an arm's output differs beyond numeric ties."""
    for number, trial in enumerate(trials):
        for row, judged in enumerate(trial.verdicts[arm]):
            if judged.outcome == BUG and judged.divergence is not None:
                where = f"prompt {number}, row {row}, token {judged.divergence.position}"
                yield f"{where}, margin {judged.divergence.margin:.2g}"


def trials_of(records: Sequence[Record]) -> list[Trial]:
    """What `run_records` wrote."""
    runs: dict[int, dict[str, Run]] = {}
    verdicts: dict[int, dict[str, list[Verdict]]] = {}
    for record in records:
        if record["kind"] == "run":
            number, arm, outcomes = record["prompt"], record["arm"], record["outcome"]
            ids = [range(count) for count in record["tokens"]]  # how many, not which
            run = Run(ids, record["seconds"], record["first_seconds"], record["steps"])
            runs.setdefault(number, {})[arm] = run
            margins = record.get("margins", [None] * len(outcomes))
            verdicts.setdefault(number, {})[arm] = list(map(Verdict, outcomes, margins))
    return [Trial(None, runs[number], verdicts[number]) for number in sorted(runs)]


@dataclass(frozen=True)
class Row:
    """One arm in one cell, among its trials; ``attainable`` is the best speed-up that its drafts could give."""

    cell: str
    arm: str
    trials: Sequence[Trial]
    attainable: float = NONE

    @property
    def runs(self) -> list[Run]:
        return [trial.runs[self.arm] for trial in self.trials]

    @property
    def rate(self) -> float:
        return float(np.median([run.rate for run in self.runs]))

    @property
    def tokens_per_step(self) -> float:
        return tokens_per_step(self.runs)

    def over(self, base: str, *, decoding_only: bool = False) -> Estimate:
        """How many times as fast as another arm, if that is here."""
        if base == self.arm or base not in self.trials[0].runs:
            return Estimate(NONE)
        return ratio(self.trials, self.arm, base, decoding_only=decoding_only)

    @cached_property
    def decoding(self) -> Estimate:
        """Speed over autoregression, prefill and its token left out of both."""
        return self.over(PLAIN, decoding_only=True)

    @property
    def efficiency(self) -> float:
        """Speed-up of decoding for each token per step: 1 would be a tree that costs what one token does."""
        return self.decoding.value / self.tokens_per_step

    @property
    def fraction(self) -> float:
        """Speed-up of decoding over the attainable one."""
        return self.decoding.value / self.attainable

    @property
    def over_best_fixed(self) -> Estimate:
        """`auto` over the fixed shape that is fastest here."""
        fixed = [arm for arm in self.trials[0].runs if arm.startswith("fixed")]
        if self.arm != AUTO or not fixed:
            return Estimate(NONE)
        return self.over(max(fixed, key=lambda arm: ratio(self.trials, arm, PLAIN).value))

    @property
    def verdicts(self) -> list[Verdict]:
        return [judged for trial in self.trials for judged in trial.verdicts[self.arm]]

    @property
    def is_reference(self) -> bool:
        """Whether the others' output was held against this arm's."""
        judged = self.trials[0].verdicts
        return self.arm == next((arm for arm, rows in judged.items() if rows[0].outcome != NOT_COMPARED), None)


def rows_of(cell: str, trials: Sequence[Trial], limits: Mapping[str, float] | None = None) -> list[Row]:
    """One row for each arm of a cell; ``limits`` are attainable speed-ups by arm."""
    return [Row(cell, arm, trials, (limits or {}).get(arm, NONE)) for arm in trials[0].runs]


def recorded_rows(cell: str, records: Sequence[Record]) -> list[Row]:
    """The rows of a file's lines."""
    limits = {record["arm"]: record["speedup"] for record in records if record["kind"] == "limit"}
    return rows_of(cell, trials_of(records), limits)


def figure(value: float, form: str = ".2f") -> str:
    """A number, or nothing where there is none."""
    return f"{value:{form}}" if value == value else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "cell": lambda row: row.cell,
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
    "identical": lambda row: verdict(row.verdicts),
}
# Of the terminal, whose 80 columns hold no more.
NARROW: dict[str, Callable[[Row], str]] = {
    "": lambda row: row.arm,
    "tok/s": COLUMNS["tokens/s"],
    "tok/\nstep": COLUMNS["tokens/step"],
    "vs HF": COLUMNS["vs HF"],
    "vs autoregr.": COLUMNS["vs autoregression"],
    "decoding\nonly": lambda row: figure(row.decoding.value),
    "identical": lambda row: "" if row.is_reference else COLUMNS["identical"](row),
}


@dataclass(frozen=True)
class Overview:
    """The line of a cell: `auto` there, and what was measured inside it."""

    records: Sequence[Record]

    @property
    def header(self) -> Record:
        return self.records[0]

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.arm: row for row in recorded_rows(self.header["name"], self.records)}

    @property
    def prompts(self) -> str:
        count, batch = self.header["effort"]["prompts"], self.header["batch"]
        return f"{count} x {batch}" if batch > 1 else str(count)

    def inside(self, kind: str, name: str, form: str) -> str:
        """A figure of `auto`'s profile or memory; nothing where that was not measured."""
        found = (record[name] for record in self.records if record["kind"] == kind and record["arm"] == AUTO)
        return figure(next(found, NONE), form)


OVERVIEW: dict[str, Callable[[Overview], str]] = {
    "cell": lambda cell: str(cell.header["name"]),
    "prompts": lambda cell: cell.prompts,
    "autoregression vs HF": lambda cell: COLUMNS["vs HF"](cell.rows[PLAIN]),
    **{
        name: lambda cell, name=name: COLUMNS[name](cell.rows[AUTO])  # type: ignore[misc]
        for name in ("tokens/step", "vs HF", "vs autoregression", "decoding only", "fraction", "vs best fixed")
    },
    "overhead": lambda cell: cell.inside("profile", "overhead", ".1%"),
    "MiB beyond": lambda cell: cell.inside("memory", "beyond", ".0f"),
}


def inner_markdown(cell: str, records: Sequence[Record]) -> str:
    """Profile and memory of one cell; empty where they were not measured."""
    lines = ""
    for record in records:
        if record["kind"] == "profile":
            stages = ", ".join(f"{name} {ms:.2f} ms ({share:.0%})" for name, ms, share in record["stages"])
            outside = f"outside verification and drafting {record['overhead']:.1%}"
            lines += f"- {cell}, {record['arm']}: {stages}; {outside}\n"
        elif record["kind"] == "memory":
            lines += f"- {cell}, {record['arm']}: {memory_line(record)}\n"
    return lines


def memory_line(mebibytes: dict[str, float]) -> str:
    """What decoding holds, in words."""
    return (
        "{beyond:.0f} MiB beyond model ({model:.0f}), drafter ({drafter:.0f}) and key-value cache ({cache:.0f}): "
        "packed weights {packed:.0f}, working tensors {working:.0f}"
    ).format(**mebibytes)
