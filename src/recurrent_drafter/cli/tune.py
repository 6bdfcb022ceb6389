"""``recurrent-drafter tune``: measure costs and acceptance here, find the shape of draft that pays, and save it."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.cli.figures import named
from recurrent_drafter.cli.inputs import decoding_of, load_prompts, open_speculator
from recurrent_drafter.cli.options.decoding import SpeculatorOptions
from recurrent_drafter.cli.options.measuring import PromptOptions, TuneOptions, tuning_folder
from recurrent_drafter.decoding.costs import Tuning, conditions
from recurrent_drafter.measure.ruler import BUG, tokens_per_step, verdict, verdicts_on
from recurrent_drafter.measure.tuning import BatchFindings, Search, label
from recurrent_drafter.models.loading import load_drafter, load_verifier, save_drafter
from recurrent_drafter.records.paths import TUNING_FILE
from recurrent_drafter.records.provenance import provenance, write_json
from recurrent_drafter.report.charts import MISSING, can_draw, draw_speed_maps
from recurrent_drafter.report.tables import Columns, terminal


def run(which: SpeculatorOptions, asked: PromptOptions, options: TuneOptions, *, argv: list[str]) -> int:
    folder = tuning_folder(which, options)
    if not can_draw():
        print(MISSING, file=sys.stderr)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = open_speculator(which.drafter(), model, tokenizer, which.shape)
    assert speculator.drafter is not None
    if max(options.widths) > (most := speculator.drafter.config.draft_vocab_size):
        raise ValueError(f"--widths has {max(options.widths)} in it, expected at most {most} (the draft vocabulary)")
    prompts = load_prompts(asked, speculator.verifier, tokenizer, count=20)
    console, decoding = Console(), decoding_of(asked, model)
    with Progress(console=console, transient=True) as progress:
        search = Search(
            speculator, prompts, decoding, options.batch_size, options.widths, options.lengths, options.confirm,
            lambda things, said: progress.track(things, description=said),
        )  # fmt: skip
        findings, single = search.run()
    for found in findings:
        console.print(table(found, f"{decoding.protocol}, greedy, {named(model.dtype)}: speed over autoregression"))
    differing = [(found.batch, comparison) for found in findings for comparison in found.differing]
    for batch, comparison in differing:
        console.print(f"batch {batch}, {comparison.explained(tokenizer)}", markup=False, highlight=False)
    if any(comparison.verdict.outcome == BUG for _, comparison in differing):
        console.print("nothing is saved: speculation changed the output")
        return 1
    if options.copy_drafter:
        save_drafter(load_drafter(which.speculator_path or str(demo_drafter_path())), folder)
    made = {**provenance(argv, model.device.type), "asked": dataclasses.asdict(asked)}
    for line in save(folder, findings, Tuning(findings[0].best.shape, single, conditions(model)), made):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def table(found: BatchFindings, title: str) -> Table:
    predicted = {label(cell.shape): cell for cell in found.cells.values()}
    columns: Columns = {
        "beams x length": lambda arm: f"[bold]{arm}[/]" if predicted.get(arm) is found.best else arm,
        "walk": lambda arm: f"{predicted[arm].tokens_per_step:.2f}" if arm in predicted else "",
        "tok/step": lambda arm: f"{tokens_per_step(found.trials, arm):.2f}",
        "predicted": lambda arm: f"{predicted[arm].speedup:.2f}" if arm in predicted else "",
        "measured": lambda arm: f"{found.speedup(arm):.2f}",
        "decoding only": lambda arm: f"{found.speedup(arm, decoding_only=True):.2f}",
        "identical": lambda arm: verdict(verdicts_on(found.trials, arm)),
    }
    return terminal(found.arms[1:], columns, f"batch {found.batch}, {title}")


def save(folder: Path, findings: Sequence[BatchFindings], tuning: Tuning, made: dict[str, Any]) -> list[str]:
    """Write ``tuning.json`` and the picture; returns what there is to say about it."""
    batches = [found.as_record() for found in findings]
    write_json(folder / TUNING_FILE, {**made, **tuning.as_record(), "batches": batches})
    said = [f"{folder / TUNING_FILE}: {label(tuning.shape)} at batch {findings[0].batch}, and the costs measured here"]
    if can_draw():
        grids = {f"batch {found.batch}": {cell: x.speedup for cell, x in found.cells.items()} for found in findings}
        hardware, dtype = (tuning.holds_for[name] for name in ("hardware", "dtype"))
        title = f"{hardware['device']}, threads: {hardware['threads']}, {dtype}"
        draw_speed_maps(folder / "tuning.png", grids, title)
        said.append(f"{folder / 'tuning.png'}: speed over width and length, at the best number of nodes")
    if (folder / "config.json").is_file():
        said.append(f"used from now on, on this machine and in this dtype, by --speculator_path {folder}")
    else:
        said.append(
            f"{folder} holds no drafter: {TUNING_FILE} is used where it lies beside one (--copy_drafter puts it there)"
        )
    return said
