"""The serving benchmark: `python benchmarks/serving.py`, beside vLLM; docs/serving.md says what is measured and how.

Writes one file of JSON lines for each concurrency and temperature, then the table (table.md) of all that lie there.
"""

import argparse
import sys
import time
from itertools import chain, product
from pathlib import Path

import torch

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench import serving
from recurrent_drafter.bench.serving import SERVING_COLUMNS, SYNCHRONOUS, Work, serving_rows
from recurrent_drafter.bench.workload import demo_prompts
from recurrent_drafter.cli.main import quiet
from recurrent_drafter.measure.ruler import verdict
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import provenance, read_records, write_records
from recurrent_drafter.report.document import markdown
from recurrent_drafter.vllm.compatibility import installed_version

PROMPT_LENGTH = 128
ROUNDS = {1: 12, 4: 6}  # by concurrency; at others 3
EACH = 2  # requests in a round, times the concurrency: so that some begin while others run
SLACK = 32  # of the context: near its end vLLM does not draft


def main() -> int:
    options = parsed()
    quiet()
    if not options.table_only:
        run(options)
    return summarize(options.output_dir)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    length = load_drafter(demo_drafter_path()).config.beam_length
    names = [arm.name for arm in serving.engine_arms(length)]
    parser.add_argument("--engines", nargs="+", default=names, choices=names)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 0.7])
    parser.add_argument("--beam_length", type=int, default=length, help="tokens drafted (default: the drafter's own)")
    parser.add_argument("--no_shed", dest="shed", action="store_false", help="draft as much under load as without")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens per reply, end tokens ignored")
    parser.add_argument("--rounds", type=int, help=f"turns of each engine (default {ROUNDS}, otherwise 3)")
    parser.add_argument("--quick", action="store_true", help="1 round of 16 tokens: to see that it runs")
    parser.add_argument("--table_only", action="store_true", help="the table from the files that are there")
    parser.add_argument("--output_dir", type=Path, default=Path("results/serving"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.new_tokens = 1, 16
    if not options.table_only and installed_version() is None:
        parser.error("vLLM is not installed here: docs/serving.md says how")
    if SYNCHRONOUS not in options.engines:
        parser.error(f"--engines lacks {SYNCHRONOUS!r}, which the others are compared with")
    return options


def run(options: argparse.Namespace) -> None:
    model, tokenizer = load_verifier("demo", dtype="float32")
    drafter = load_drafter(demo_drafter_path(), dtype=torch.float32).to(model.device)
    prompts = [prompt.tolist() for prompt in demo_prompts(tokenizer, 1 << 10, PROMPT_LENGTH)]
    arms = [arm for arm in serving.engine_arms(options.beam_length, shed=options.shed) if arm.name in options.engines]
    longest = PROMPT_LENGTH + options.new_tokens + SLACK
    print(f"starting {len(arms)} engines", flush=True)
    with serving.engines(arms, longest, max(options.concurrency)) as ready:
        for temperature, concurrency in product(options.temperature, options.concurrency):
            begun = time.monotonic()
            works = works_of(prompts, concurrency, temperature, options)
            header = {"kind": "serving", "concurrency": concurrency, "temperature": temperature,
                      "beam_length": options.beam_length, "shed": options.shed, **provenance(sys.argv)}  # fmt: skip
            records = serving.measure(ready, works, Verifier(model), drafter, options.beam_length)
            path = options.output_dir / f"concurrency-{concurrency}_temperature-{temperature:g}.jsonl"
            table = markdown(serving_rows(write_records(path, chain([header], records))), SERVING_COLUMNS)
            print(f"\n{path.stem} ({time.monotonic() - begun:.0f} s)\n{table}", flush=True)


def works_of(prompts: list[list[int]], concurrency: int, temperature: float, options: argparse.Namespace) -> list[Work]:
    """Rounds of prompts, the same in every engine; they begin again where there are not enough."""
    rounds, each = options.rounds or ROUNDS.get(concurrency, 3), EACH * concurrency
    chosen = [prompts[number % len(prompts)] for number in range(rounds * each)]
    parts = [chosen[start : start + each] for start in range(0, len(chosen), each)]
    return [Work(part, concurrency, options.new_tokens, temperature) for part in parts]


def summarize(output_dir: Path) -> int:
    """The table of everything that lies there; 1 when greedy output differs beyond a tie."""
    files = [read_records(path) for path in sorted(output_dir.glob("*.jsonl"))]
    files.sort(key=lambda records: (records[0]["temperature"], records[0]["concurrency"]))
    rows = [row for records in files for row in serving_rows(records)]
    text = markdown(rows, SERVING_COLUMNS)
    (output_dir / "table.md").write_text(text)
    print(text, f"\n{output_dir / 'table.md'}", sep="")
    return 1 if any(verdict(row.verdicts).startswith("NO") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
