"""The decoding engine's benchmark: `python benchmarks/engine.py`; docs/benchmarks.md says what is measured and how.

Writes one file of JSON lines per cell, then the table (table.md) and the plot (plot.png) of all cells that lie there.
"""

import argparse
import sys
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import CELLS, OVERVIEW, inner_markdown, plot, recorded_rows
from recurrent_drafter.bench.contexts import CONTEXT_COLUMNS, context_rows, measure_contexts, reached
from recurrent_drafter.bench.engine import Effort, measure, verifier_of
from recurrent_drafter.bench.long_replies import LONG_COLUMNS, MOST, long_rows, measure_long_replies, soak
from recurrent_drafter.bench.workload import DEMO, SHAPES, BenchCell, all_cells, selected
from recurrent_drafter.cli.main import quiet
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import AUTO, Decoding
from recurrent_drafter.measure.ruler import verdict
from recurrent_drafter.models.loading import computes_in_bfloat16
from recurrent_drafter.records.provenance import provenance, read_records, write_records
from recurrent_drafter.report.document import markdown, markdown_table

LEFT_OUT = """HF prompt lookup takes one prompt at a time, needs text, and room for its drafts in the context: left
out at batch 2 and more, for random weights and at context 896. HF assisted generation needs a smaller model of the same
vocabulary: there is none here."""
SOAKED = """- soak: {tokens} tokens in {generations} generations, {step_ms:.2f} ms per step; from the second fifth to
  the last, time per step x {time_growth:.3f} and resident memory {memory_growth_mib:+.1f} MiB
"""


def main() -> int:
    options = parsed()
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bfloat16 = computes_in_bfloat16(device)
    cells = all_cells(options.models, "bfloat16" if has_bfloat16 else "float32")
    if not has_bfloat16 and not options.emulate_bfloat16:
        left_out = [cell.name for cell in cells if cell.dtype == "bfloat16"]
        cells = [cell for cell in cells if cell.dtype != "bfloat16"]
        print(f"no bfloat16 arithmetic on this {device}: left out {', '.join(left_out)} (--emulate_bfloat16 runs them)")
    cells = selected(cells, options.cells)
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    if options.long:
        return run_long(options.output_dir)
    if options.context:
        return run_contexts(device, options.output_dir)
    print(LEFT_OUT)
    prompts, new_tokens = (3, 32) if options.quick else (20, 128)
    effort = Effort(options.prompts or prompts, options.new_tokens or new_tokens, options.profile)
    if not options.table_only:
        for cell in cells:
            run(cell, effort, device, options.output_dir)
        if options.soak:
            run_soak(options.soak, effort, device, options.output_dir)
    return summarize(options.output_dir)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=[DEMO, *SHAPES], choices=[DEMO, *SHAPES])
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns such as 'demo/batch-*'")
    parser.add_argument("--list", action="store_true", help="show the cells' names, run nothing")
    parser.add_argument("--prompts", type=int, help="prompts per cell, or batches of prompts (default 20)")
    parser.add_argument("--new_tokens", type=int, help="tokens per reply, end tokens ignored (default 128)")
    parser.add_argument("--quick", action="store_true", help="3 prompts of 32 tokens: to see that it runs")
    parser.add_argument("--profile", action="store_true", help="also where a step's time and memory go")
    parser.add_argument("--soak", type=int, default=0, metavar="TOKENS", help="also generate so many without a break")
    parser.add_argument("--long", action="store_true", help="only whether tokens late in a long reply cost more")
    parser.add_argument(
        "--context", action="store_true", help="only a step after contexts up to 8,000 tokens, and of 64 rows"
    )
    parser.add_argument("--emulate_bfloat16", action="store_true", help="run bfloat16 without arithmetic for it: slow")
    parser.add_argument("--table_only", action="store_true", help="table and plot from the files that are there")
    parser.add_argument("--output_dir", type=Path, default=Path("results/engine"))
    return parser.parse_args()


def path_of(cell: str, output_dir: Path) -> Path:
    return output_dir / f"{cell.replace('/', '_')}.jsonl"


def run(cell: BenchCell, effort: Effort, device: str, output_dir: Path) -> None:
    begun = time.monotonic()
    header = {"kind": "cell", **asdict(cell), "effort": asdict(effort), **provenance(sys.argv)}
    written = write_records(path_of(cell.name, output_dir), chain([header], measure(cell, effort, device)))
    table = markdown(recorded_rows(written), CELLS)
    print(f"\n{cell.name} ({time.monotonic() - begun:.0f} s)\n{table}", flush=True)


def run_soak(tokens: int, effort: Effort, device: str, output_dir: Path) -> None:
    dtype = "bfloat16" if computes_in_bfloat16(device) else "float32"
    model, make_prompts = verifier_of(DEMO, dtype, device)
    speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model)
    result = soak(speculator, make_prompts(1, 128)[0], tokens, Decoding(effort.new_tokens))
    header = {"kind": "soak", **result.summary(), **provenance(sys.argv)}
    series = {"kind": "series", "step_seconds": result.step_seconds, "resident": result.resident}
    write_records(path_of("soak", output_dir), [header, series])


def run_contexts(device: str, output_dir: Path) -> int:
    """1 when a step after a long context, or of a batch, takes more than it may."""
    found = list(measure_contexts(device=device))
    write_records(path_of("context", output_dir), [{**times.as_record(), **provenance(sys.argv)} for times in found])
    print("a step by context\n", markdown_table(CONTEXT_COLUMNS, context_rows(found)), sep="")
    verdicts = reached(found)
    print("\n".join(f"- {line}: {'yes' if holds else 'NO'}" for line, holds in verdicts.items()))
    return 0 if all(verdicts.values()) else 1


def run_long(output_dir: Path) -> int:
    """1 when a step's own work takes more than `MOST` times as long late in a reply as early."""
    found = list(measure_long_replies())
    records = [{**measured.as_record(), **provenance(sys.argv)} for measured in found]
    write_records(path_of("long", output_dir), records)
    print("milliseconds of a step by stage\n", markdown_table(LONG_COLUMNS, long_rows(found)), sep="")
    return 1 if any(measured.ratio > MOST for measured in found) else 0


def summarize(output_dir: Path) -> int:
    """Table and plot of every cell that lies there; 1 when the output of one differs beyond a tie."""
    files = {record["name"]: lines for lines in map(read_records, sorted(output_dir.glob("*.jsonl")))
             if (record := lines[0])["kind"] == "cell"}  # fmt: skip
    order = [cell.name for cell in all_cells([DEMO, *SHAPES], "float32")]
    files = dict(sorted(files.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))
    rows = [row for records in files.values() for row in recorded_rows(records)]
    text = f"{markdown([row for row in rows if row.arm == AUTO], OVERVIEW)}\n{markdown(rows, CELLS)}\n"
    text += "".join(map(inner_markdown, files.values()))
    if (soaked := path_of("soak", output_dir)).exists():
        text += SOAKED.format(**read_records(soaked)[0])
    (output_dir / "table.md").write_text(text)
    plot(rows, output_dir / "plot.png")
    print(text, f"\n{output_dir / 'table.md'}, {output_dir / 'plot.png'}", sep="")
    return 1 if any(verdict(row.verdicts).startswith("NO") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
