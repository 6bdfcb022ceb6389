"""The report of a reproduction: a template says all of it, and is filled here with what was found."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recurrent_drafter.measure.arms import AUTO
from recurrent_drafter.measure.ruler import BUG, TIE, Estimate, Verdict, interval, ratio_of_sums, verdict
from recurrent_drafter.report import charts
from recurrent_drafter.report.document import estimated, fill, page
from recurrent_drafter.reproduce.findings import Findings
from recurrent_drafter.reproduce.results import RESULTS, Record, Results


def write_report(results: Results, made: Record) -> list[Path]:
    """``report.html``, and ``report.md`` with its pictures, of all outcomes so far; their paths, and the raw results'.

    ``made`` is `provenance` of the command that asks for the report.
    """
    findings = Findings(results.records)
    pictures = drawings(findings) if charts.can_draw() else {}
    text = fill("reproduction.md", **known(results, findings, made), pictures=pictures)
    html, markdown, raw = (results.folder / name for name in ("report.html", "report.md", RESULTS))
    (results.folder / "pictures").mkdir(parents=True, exist_ok=True)
    for address, picture in pictures.items():
        (results.folder / address).write_bytes(picture)
    html.write_text(page(text, pictures), encoding="utf-8")
    markdown.write_text(text, encoding="utf-8")
    return [html, markdown, *([raw] if raw.exists() else [])]


def known(results: Results, findings: Findings, made: Record) -> dict[str, Any]:
    """What the template is filled with; a sweep that has not finished is None."""
    shapes, tree, vocabulary = (findings.sweep(kind) for kind in ("shapes", "tree", "vocabulary"))
    gains = findings.gains(method="ground_truth")
    return {
        "results": results,
        "options": results.options,
        "findings": findings,
        "calibration": findings.sweep("calibration"),
        "distilled": [gain for gain in gains if gain.arm.method == "distilled" and gain.arm.rnn],
        "shapes": shapes,
        "walked": along_shapes(shapes) if shapes else {},
        "tree": tree,
        "saved": [1 - row["distinct"] / row["candidates"] for row in tree["rows"]] if tree else [],
        "vocabulary": vocabulary,
        "settled": {name: shown(value) for name, value in vars(results.options).items()},
        "command": shlex.join(made["argv"]),
        "made": made,
        "machines": machines([made, *(record["made"] for record in findings.records if "made" in record)]),
        "missing": "" if charts.can_draw() else charts.MISSING,
        "change": change,
        "estimated": estimated,
        "identical": identical,
        "walked_along": walked_along,
    }


def change(ratio: Estimate) -> str:
    """``+7.7 % (+1.2 to +9.9)``."""
    value, *ends = (f"{100 * (end - 1):+.1f}" for end in (ratio.value, ratio.low, ratio.high) if end is not None)
    return f"{value} %" + (f" ({' to '.join(ends)})" if ends else "")


def identical(batch: Record) -> str:
    """What became of the comparison with plain autoregression's output."""
    return verdict([*[Verdict(BUG)] * batch["bugs"], *[Verdict(TIE)] * batch["ties"]])


def walked_along(row: Record) -> Estimate:
    """One drafter's tokens per step, with an interval over replies."""
    return interval(list(zip(row["tokens"], row["steps"], strict=True)), ratio_of_sums)


def along_shapes(shapes: Record) -> dict[tuple[int, int], Estimate]:
    return {(row["beam_width"], row["beam_length"]): walked_along(row) for row in shapes["whole"]}


def machines(made: Iterable[Record]) -> list[Record]:
    """Commit, versions and hardware: each once."""
    found: list[Record] = []
    for record in made:
        machine = {name: record[name] for name in ("commit", "versions", "hardware")}
        if machine not in found:
            found.append(machine)
    return found


def shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def drawings(findings: Findings) -> dict[str, bytes]:
    """The report's pictures, by their addresses."""
    drawn = {
        f"tokens-per-step-{name}": on_one_set(findings, name)
        for name in dict.fromkeys(place.set for place in findings.places)
    }
    curves = {
        f"{arm.learns}, {arm.part}#{arm.training_set}{record['seed']}": [
            (point["step"], point["tokens_per_step"]) for point in record["curve"]
        ]
        for arm, records in findings.trainings.items()
        for record in records
        if record["curve"]
    }
    if curves:
        drawn["while-training"] = charts.lines(curves, "training steps", "held-out tokens per step")
    if (shapes := findings.sweep("shapes")) is not None:
        drawn |= of_shapes(shapes)
    vocabulary = findings.sweep("vocabulary")
    if vocabulary is not None and len(rows := vocabulary["rows"]) > 1:
        series = {
            "tokens per step": [(row["size"], walked_along(row).value) for row in rows],
            "predicted speed": [(row["size"], row["predicted_speedup"]) for row in rows],
        }
        label = "tokens per step; times as fast"
        drawn["draft-vocabulary"] = charts.lines(series, "draft vocabulary", label, logarithmic=True)
    return {f"pictures/{name}.svg": picture for name, picture in drawn.items()}


def on_one_set(findings: Findings, name: str) -> bytes:
    """Every arm's tokens per step on an evaluation set."""
    groups: dict[str, dict[str, Estimate]] = {}
    for place in findings.places:
        for arm in findings.trainings if place.set == name else ():
            group = groups.setdefault(f"{arm.training_set}\n{arm.part}\n{place.beams}", {})
            group[arm.learns] = findings.estimate(arm, place)
    return charts.intervals(groups, f"tokens per step on {name}, 95 % intervals")


def of_shapes(shapes: Record) -> dict[str, bytes]:
    """Tokens per step and predicted speed by shape, measured speed by batch."""
    tokens = {"whole tree": {shape: estimate.value for shape, estimate in along_shapes(shapes).items()}}
    speeds = {
        f"batch {batch['batch_size']}": {
            (cell["shape"]["beam_width"], cell["shape"]["beam_length"]): cell["speedup"] for cell in batch["predicted"]
        }
        for batch in shapes["batches"]
    }
    drawn = {
        "tokens-by-shape": charts.svg(charts.heat_maps(tokens, "", "tokens per step")),
        "speed-by-shape": charts.svg(charts.heat_maps(speeds, "", "speed over autoregression (predicted)")),
    }
    if len(speeds) > 1:
        best, auto = (
            [
                (batch["batch_size"], batch["decoded"][name or batch["best"]]["speedup"][0])
                for batch in shapes["batches"]
            ]
            for name in ("", AUTO)
        )
        series = {"best fixed shape": best, AUTO: auto}
        label = "speed over autoregression"
        drawn["speed-by-batch"] = charts.lines(series, "batch size", label, logarithmic=True)
    return drawn
