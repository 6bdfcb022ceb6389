"""From raw records to a table: everything that is shown is computed from the JSON lines."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from recurrent_drafter.measure.arms import AUTO, HF, PLAIN
from recurrent_drafter.measure.comparison import ArmResult, Run

Ratio = tuple[float, float, float]  # median and its 95 % interval


@dataclass(frozen=True)
class Row:
    """One arm in one cell; what does not apply is None. Ratios of decoding leave prefill and its token out."""

    cell: str
    arm: str
    rate: float
    tokens_per_step: float | None
    over_hf: Ratio | None
    over_plain: Ratio | None
    decoding: Ratio | None
    attainable: float | None
    equality: str
    over_best_fixed: Ratio | None = None

    @property
    def efficiency(self) -> float | None:
        """Speed-up of decoding for each token per step: 1 would be a tree that costs what one token does."""
        if self.decoding is None or self.tokens_per_step is None:
            return None
        return self.decoding[0] / self.tokens_per_step

    @property
    def fraction(self) -> float | None:
        """Speed-up of decoding over the attainable one."""
        return None if self.decoding is None or self.attainable is None else self.decoding[0] / self.attainable


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write JSON lines as they come, under a temporary name until all have come; return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    written = []
    with unfinished.open("w") as file:
        for record in records:
            print(json.dumps(record), file=file, flush=True)
            written.append(record)
    unfinished.replace(path)
    return written


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def arm_results(records: Sequence[dict[str, Any]]) -> list[ArmResult]:
    """The arms of one cell, in their order."""
    results: dict[str, ArmResult] = {}
    names = [field.name for field in fields(Run)]
    for record in records:
        if record["kind"] == "run":
            result = results.setdefault(record["arm"], ArmResult(record["arm"]))
            result.runs.append(Run(**{name: record[name] for name in names}))
        elif record["kind"] == "bug":
            results[record["arm"]].bugs.append(record["where"])
    return list(results.values())


def rows_of(cell: str, records: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each arm of a cell."""
    results = arm_results(records)
    by_name = {result.name: result for result in results}
    limit = {record["arm"]: record["speedup"] for record in records if record["kind"] == "limit"}
    hf, plain = by_name.get(HF), by_name[PLAIN]
    fixed = [result for result in results if result.name.startswith("fixed")]
    best = max(fixed, key=lambda result: result.speedup(plain)[0], default=None)
    return [
        Row(
            cell=cell,
            arm=result.name,
            rate=result.rate,
            tokens_per_step=result.tokens_per_step if result.runs[0].steps is not None else None,
            over_hf=None if hf is None or result is hf else result.speedup(hf),
            over_plain=None if result is plain else result.speedup(plain),
            decoding=None if result is plain else result.speedup(plain, prefill=False),
            attainable=limit.get(result.name),
            equality=result.equality,
            over_best_fixed=result.speedup(best) if best is not None and result.name == AUTO else None,
        )
        for result in results
    ]


def ratio(value: Ratio | None) -> str:
    """``2.31 (2.20-2.41)``."""
    return "" if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)


def figure(value: float | None) -> str:
    """Two digits after the point, or nothing."""
    return "" if value is None else f"{value:.2f}"


COLUMNS = {
    "cell": lambda row: row.cell,
    "arm": lambda row: row.arm,
    "tokens/s": lambda row: f"{row.rate:.1f}",
    "tokens/step": lambda row: figure(row.tokens_per_step),
    "vs HF": lambda row: ratio(row.over_hf),
    "vs autoregression": lambda row: ratio(row.over_plain),
    "decoding only": lambda row: ratio(row.decoding),
    "of tokens/step": lambda row: figure(row.efficiency),
    "attainable": lambda row: figure(row.attainable),
    "fraction": lambda row: figure(row.fraction),
    "vs best fixed": lambda row: ratio(row.over_best_fixed),
    "identical": lambda row: row.equality,
}


def markdown(rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]] = COLUMNS) -> str:
    """A table for a document, of rows as the columns show them."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[show(row) for show in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


OVERVIEW = (
    "cell", "prompts", "autoregression vs HF", "tokens/step", "vs HF", "vs autoregression", "fraction", "vs best fixed",
    "overhead", "MiB beyond",
)  # fmt: skip


def overview(cells: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """A table of `auto` alone, a line for each cell; overhead and memory where they were measured."""
    lines = [list(OVERVIEW), ["---"] * len(OVERVIEW)]
    for name, records in cells.items():
        rows = {row.arm: row for row in rows_of(name, records)}
        auto, plain = rows[AUTO], rows[PLAIN]
        measured = {record["kind"]: record for record in records if record.get("arm") == AUTO}
        prompts, batch = records[0]["effort"]["prompts"], records[0]["batch"]
        lines.append([
            name,
            f"{prompts} x {batch}" if batch > 1 else str(prompts),
            ratio(plain.over_hf),
            figure(auto.tokens_per_step),
            ratio(auto.over_hf),
            ratio(auto.over_plain),
            figure(auto.fraction),
            ratio(auto.over_best_fixed),
            f"{measured['profile']['overhead']:.1%}" if "profile" in measured else "",
            f"{measured['memory']['beyond']:.0f}" if "memory" in measured else "",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def inner_markdown(cell: str, records: Sequence[dict[str, Any]]) -> str:
    """Profile and memory of one cell; empty where they were not measured."""
    lines = []
    for record in records:
        if record["kind"] == "profile":
            stages = ", ".join(f"{name} {ms:.2f} ms ({share:.0%})" for name, ms, share in record["stages"])
            lines.append(
                f"- {cell}, {record['arm']}: {stages}; outside verification and drafting {record['overhead']:.1%}"
            )
        elif record["kind"] == "memory":
            lines.append(f"- {cell}, {record['arm']}: {memory_line(record)}")
    return "".join(line + "\n" for line in lines)


def memory_line(mebibytes: dict[str, float]) -> str:
    """What decoding holds, in words."""
    return (
        "{beyond:.0f} MiB beyond model ({model:.0f}), drafter ({drafter:.0f}) and key-value cache ({cache:.0f}): "
        "packed weights {packed:.0f}, working tensors {working:.0f}"
    ).format(**mebibytes)
