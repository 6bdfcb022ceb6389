"""``recurrent-drafter tune``: measure costs and acceptance here, find the shape of draft that pays, and save it."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.cli.checks import tuning_folder
from recurrent_drafter.cli.generate import load_speculator
from recurrent_drafter.cli.options.decoding import SpeculatorOptions
from recurrent_drafter.cli.options.measuring import PromptOptions, TuneOptions
from recurrent_drafter.cli.prompts import load_prompts
from recurrent_drafter.cli.verify import explain
from recurrent_drafter.decoding.costs import Costs, Tuning, conditions
from recurrent_drafter.decoding.decode import BeamDrafter, DraftController, FixedController
from recurrent_drafter.decoding.draft_controller import LONGEST, TreeController
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure.divergence import Comparison, first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies, left_padded
from recurrent_drafter.measure.tuning import (
    Acceptance,
    BatchCosts,
    Prediction,
    Timed,
    best_of_each_cell,
    confirm,
    decode_timed,
    measure_acceptance,
    measure_batch_costs,
    predict,
    speedup,
    tokens_per_step,
)
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import TUNING_FILE
from recurrent_drafter.records.provenance import provenance, write_json
from recurrent_drafter.report.charts import MISSING, can_draw, draw_speed_maps

ALONE, AUTO = "autoregression", "auto"


@dataclass
class BatchFindings:
    """What was measured at one batch size: costs, the best prediction of every cell, and the runs that checked them."""

    batch: int
    costs: BatchCosts
    cells: dict[tuple[int, int], Prediction]
    runs: dict[str, list[Timed]]
    differing: list[Comparison]

    @property
    def best(self) -> Prediction:
        """The fastest shape of those that were decoded with."""
        tried = [cell for cell in self.cells.values() if label(cell.shape) in self.runs]
        return max(tried, key=lambda cell: speedup(self.runs[label(cell.shape)], self.runs[ALONE])[0])


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    verifier: Verifier
    drafter: RecurrentDrafter
    prompts: Sequence[Tensor]
    asked: PromptOptions
    options: TuneOptions
    end_ids: tuple[int, ...]
    progress: Progress


def run(which: SpeculatorOptions, asked: PromptOptions, options: TuneOptions, *, argv: Sequence[str]) -> int:
    """Find the shape of draft that pays on this machine, for this model and these prompts; save it with the drafter."""
    folder = tuning_folder(which, options)
    if not can_draw():
        print(MISSING, file=sys.stderr)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = load_speculator(which, model, tokenizer)
    assert speculator.drafter is not None
    if max(options.widths) > (most := speculator.drafter.config.draft_vocab_size):
        raise ValueError(f"--widths has {max(options.widths)} in it, expected at most {most} (the draft vocabulary)")
    verifier = speculator.verifier
    prompts = load_prompts(asked, verifier, tokenizer, count=20)
    end_ids = () if asked.sustained else as_tuple(model.generation_config.eos_token_id)  # type: ignore[union-attr]
    console = Console()
    with ExitStack() as stack:
        for module in (model, speculator.drafter):
            stack.enter_context(PackedLinears(module).applied())
        progress = stack.enter_context(Progress(console=console, transient=True))
        bench = Bench(verifier, speculator.drafter, prompts, asked, options, end_ids, progress)
        findings, single = measure(bench)
    for found in findings:
        console.print(table(found, asked, str(model.dtype).removeprefix("torch.")))
        for comparison in found.differing:
            console.print(explain(f"batch {found.batch}", comparison, tokenizer), markup=False, highlight=False)
    if any(comparison.kind == "BUG" for found in findings for comparison in found.differing):
        console.print("nothing is saved: speculation changed the output")
        return 1
    for line in save(folder, findings, single, bench, which.speculator_path or str(demo_drafter_path()), argv):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def measure(bench: Bench) -> tuple[list[BatchFindings], Costs]:
    """Acceptance once; costs, predictions and their check at every batch size; and a single sequence's costs."""
    options, asked = bench.options, bench.asked
    task = bench.progress.add_task("the verifier's own replies", total=None)
    replies = greedy_replies(bench.verifier, bench.prompts, asked.new_tokens, bench.end_ids)
    held_out = HeldOutReplies(bench.verifier, replies)
    bench.progress.update(task, description="acceptance", total=len(options.widths))
    acceptances: dict[int, Acceptance] = {}
    for width in options.widths:
        acceptances[width] = measure_acceptance(held_out, bench.drafter, width, max(options.lengths))
        bench.progress.advance(task)
    bench.progress.remove_task(task)
    single = timed_costs(bench, 1)
    findings: list[BatchFindings] = []
    for batch in options.batch_size:
        costs = single if batch == 1 else timed_costs(bench, batch)
        cells = best_of_each_cell(predict(acceptances, single, costs, options.lengths))
        runs, differing = check(bench, batch, list(cells.values())[: options.confirm], single)
        findings.append(BatchFindings(batch, costs, cells, runs, differing))
    return findings, single.of_width(findings[0].best.shape.beam_width)


def timed_costs(bench: Bench, batch: int) -> BatchCosts:
    """Costs in the middle of replies to prompts of the usual length."""
    task = bench.progress.add_task(f"costs at batch {batch}", total=None)
    context = sorted(map(len, bench.prompts))[len(bench.prompts) // 2] + bench.asked.new_tokens // 2
    costs = measure_batch_costs(
        bench.verifier, bench.drafter, batch, context, bench.options.widths, bench.options.lengths
    )
    bench.progress.remove_task(task)
    return costs


def check(
    bench: Bench, batch: int, best: Sequence[Prediction], single: BatchCosts
) -> tuple[dict[str, list[Timed]], list[Comparison]]:
    """Decode with the best shapes and `auto`, interleaved with autoregression, whose output is the reference."""
    top = best[0].shape
    controllers: dict[str, DraftController] = {ALONE: FixedController(None)}
    controllers |= {label(found.shape): FixedController(found.shape) for found in best}
    controllers[AUTO] = TreeController(single.of_width(top.beam_width), DraftShape(top.beam_width, LONGEST))
    groups = [bench.prompts[start : start + batch] for start in range(0, len(bench.prompts), batch)]
    batches = [left_padded(group, bench.verifier.device) for group in groups]
    draft = BeamDrafter(bench.drafter, bench.verifier.embed)
    decoders: dict[str, Callable[[tuple[Tensor, Tensor]], Timed]] = {
        name: partial(
            decode_timed, bench.verifier, draft, controller, new_tokens=bench.asked.new_tokens, end_ids=bench.end_ids
        )
        for name, controller in controllers.items()
    }
    task = bench.progress.add_task(f"decoding at batch {batch}, {len(controllers)} ways", total=len(groups))
    runs = confirm(decoders, batches, done=lambda: bench.progress.advance(task))
    bench.progress.remove_task(task)
    replies = {name: [reply for run in timed for reply in run.replies] for name, timed in runs.items()}
    differing = []
    for name in list(runs)[1:]:
        for number, prompt in enumerate(bench.prompts):
            found = first_divergence(bench.verifier, prompt, replies[ALONE][number], replies[name][number])
            if found is not None:
                differing.append(Comparison(number, ALONE, name, found))
    return runs, differing


def label(shape: DraftShape) -> str:
    """A shape in a table: beams x length, and its nodes."""
    return f"{shape.beam_width} x {shape.beam_length}, {shape.nodes} nodes"


def table(found: BatchFindings, asked: PromptOptions, dtype: str) -> Table:
    """One batch size's figures."""
    protocol = f"{'exactly' if asked.sustained else 'up to'} {asked.new_tokens} new tokens"
    title = f"batch {found.batch}, {protocol}, greedy, {dtype}: speed over autoregression"
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("beams x length", "walk", "tok/step", "predicted", "measured", "identical"):
        shown.add_column(column, justify="left" if column.startswith("beams") else "right")
    predicted = {label(cell.shape): cell for cell in found.cells.values()}
    for name, runs in found.runs.items():
        if name == ALONE:
            continue
        cell = predicted.get(name)
        kinds = [comparison.kind for comparison in found.differing if comparison.candidate == name]
        shown.add_row(
            f"[bold]{name}[/]" if cell is found.best else name,
            f"{cell.tokens_per_step:.2f}" if cell else "",
            f"{tokens_per_step(runs):.2f}",
            f"{cell.speedup:.2f}" if cell else "",
            "{:.2f} ({:.2f}-{:.2f})".format(*speedup(runs, found.runs[ALONE])),
            "yes" if not kinds else f"{kinds.count('BUG')} BUG" if "BUG" in kinds else f"{len(kinds)} ties",
        )
    return shown


def save(
    folder: Path, findings: Sequence[BatchFindings], single: Costs, bench: Bench, drafter_path: str, argv: Sequence[str]
) -> list[str]:
    """Write ``tuning.json`` and the picture, and the drafter itself if asked; returns what there is to say about it."""
    model, best = bench.verifier.model, findings[0].best
    if bench.options.copy_drafter:
        copy_drafter(drafter_path, folder)
    holds_for = conditions(model)
    made = {**provenance(argv, model.device.type), "asked": dataclasses.asdict(bench.asked)}
    batches = [as_record(found) for found in findings]
    write_json(folder / TUNING_FILE, {**made, **Tuning(best.shape, single, holds_for).as_record(), "batches": batches})
    said = [f"{folder / TUNING_FILE}: {label(best.shape)} at batch {findings[0].batch}, and the costs measured here"]
    if can_draw():
        grids = {f"batch {found.batch}": {cell: x.speedup for cell, x in found.cells.items()} for found in findings}
        hardware = holds_for["hardware"]
        draw_speed_maps(
            folder / "tuning.png", grids, f"{hardware['device']}, threads: {hardware['threads']}, {holds_for['dtype']}"
        )
        said.append(f"{folder / 'tuning.png'}: speed over width and length, at the best number of nodes")
    if (folder / "config.json").is_file():
        said.append(f"used from now on, on this machine and in this dtype, by --speculator_path {folder}")
    else:
        said.append(
            f"{folder} holds no drafter: {TUNING_FILE} is used where it lies beside one (--copy_drafter puts it there)"
        )
    return said


def copy_drafter(path: str, folder: Path) -> None:
    """The drafter as it was saved, all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".copy-") as unfinished:
        load_drafter(path).save_pretrained(unfinished)
        for file in sorted(Path(unfinished).iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)


def as_record(found: BatchFindings) -> dict[str, Any]:
    """One batch size's figures, for the file."""
    base = found.runs[ALONE]
    decoded = {
        name: {"tokens_per_step": tokens_per_step(runs), "speedup": speedup(runs, base)}
        for name, runs in found.runs.items()
    }
    drafting = [
        {"beam_width": width, "beam_length": length, "seconds": seconds}
        for (width, length), seconds in found.costs.drafting.items()
    ]
    return {
        "batch_size": found.batch,
        "costs": {"rows": found.costs.verify.rows, "verify": found.costs.verify.verify, "draft": drafting},
        "predicted": [dataclasses.asdict(cell) for cell in found.cells.values()],
        "decoded": decoded,
    }
