"""What speculation is worth on a real chat model: `python benchmarks/real.py`; docs/benchmarks.md says all.

Every way of decoding answers every task in one process, up to the end token. Each task is a JSON line as soon as it is
measured, and a run that was stopped goes on after the last one.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import SOURCES, TASKS
from recurrent_drafter.bench.tasks import CODE, KINDS, QUESTIONS, Task, load_tasks, said, task_record, task_rows
from recurrent_drafter.cli.inputs import open_speculator
from recurrent_drafter.cli.main import quiet, reporting
from recurrent_drafter.core.tree import LOOKUP as LOOKED_UP
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import HF, LOOKUP, LOOKUP_TOKENS, PLAIN, Decoding
from recurrent_drafter.measure.ruler import BUG, Arm, compare
from recurrent_drafter.models.loading import load_verifier, verifier_fingerprint
from recurrent_drafter.models.packed_linear import arrange
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records import provenance as records
from recurrent_drafter.records.paths import check_drafter, check_model
from recurrent_drafter.report.document import terminal

MODEL = "./models/qwen2.5-coder-0.5b-instruct"  # where `make real` puts it
OURS, DRAFTER, BOTH = "lookup", "drafter", "drafter + lookup"
ARMS = (LOOKUP, PLAIN, OURS, DRAFTER, BOTH)
LONGEST = 1024  # tokens of a prompt
CIRCUMSTANCES = """{model}, {count} of {tasks} tasks, replies of at most {reply_tokens} tokens, greedy, {dtype}, batch 1
{device}, threads: {threads}; torch {torch}, transformers {transformers}, commit {commit}"""
QUICK = {"kinds": [QUESTIONS, CODE], "prompts": 10, "reply_tokens": 64, "arms": [OURS]}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default=MODEL, help=f"a folder, a hub name or 'demo' (default {MODEL})")
    parser.add_argument("--speculator_path", help="a drafter of the model: it alone, and with lookup")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help=f"what runs beside {HF} (default: all)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of tasks (default: all)")
    parser.add_argument("--prompts", type=int, help="tasks of each kind (default: 20, and 10 of those that copy)")
    parser.add_argument("--reply_tokens", type=int, default=128, help="at most: a reply ends at its end token")
    parser.add_argument("--data", type=Path, help="a folder of whole data sets, in place of the bundled samples")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="that compute (default: as many as PyTorch takes)")
    parser.add_argument("--quick", action="store_true", help="10 open questions and 10 of code, 64 tokens, two arms")
    parser.add_argument("--table_only", action="store_true", help="the tables of what is in the file")
    parser.add_argument("--output_file", type=Path, help="default results/real.jsonl, or results/real-quick.jsonl")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    for name in ("prompts", "reply_tokens", "threads"):
        if (given := getattr(options, name)) is not None and given < (least := 2 if name == "reply_tokens" else 1):
            parser.error(f"--{name} is {given}, expected at least {least}")
    if not options.speculator_path and {DRAFTER, BOTH} & set(options.arms or ()):
        parser.error(f"--arms names {DRAFTER!r}: expected --speculator_path too")
    options.output_file = options.output_file or Path(f"results/real{'-quick' if options.quick else ''}.jsonl")
    return options


@reporting
def main() -> int:
    options = parsed()
    quiet()
    if not options.table_only:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        measure(options)
    return summarize(options.output_file)


def measure(options: argparse.Namespace) -> None:
    """Every task that the file does not have yet."""
    if options.model == MODEL and not Path(MODEL).is_dir():
        raise OSError(f"there is no model at {MODEL}: make real fetches it, and --model names another")
    check_model(options.model)
    check_drafter(options.speculator_path or str(demo_drafter_path()))
    model, tokenizer = load_verifier(options.model, dtype=options.dtype)
    arrange(model)
    decoding = Decoding(options.reply_tokens, as_tuple(model.generation_config.eos_token_id))
    arms, verifier = arms_of(options, model, tokenizer, decoding)
    counts = {name: options.prompts or KINDS[name].count for name in options.kinds}
    room = (verifier.context_length or sys.maxsize) - options.reply_tokens - LOOKUP_TOKENS
    tasks = load_tasks(tokenizer, counts, min(LONGEST, room), options.data)
    done = len(records.resumed_records(options.output_file, header(options, verifier, arms, tasks)))
    batches = ways.batches_of([task.prompt for task in tasks], 1, model.device)[done:]
    trials, begun = compare(arms, batches, ways.explaining(verifier, decoding), start=done), time.monotonic()
    for number, (task, trial) in enumerate(zip(tasks[done:], trials, strict=True), start=done):
        records.append_record(options.output_file, task_record(number, task, trial, tokenizer))
        left = (time.monotonic() - begun) / (number + 1 - done) * (len(tasks) - number - 1) / 60
        for line in said(task, trial):
            print(f"{number + 1} of {len(tasks)}, {line}; about {left:.0f} min left", flush=True)


def arms_of(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> tuple[list[Arm], Verifier]:
    """Transformers' own first, whose replies all others are compared with.

    Ours remember no reply of another task, for the arms and the generations that warm up answer the same ones.
    """
    drafter, speculator = options.speculator_path, RecurrentDraftingSpeculator()
    if drafter:
        speculator = open_speculator(drafter, model, tokenizer)
    else:
        speculator.attach_verifier(model)
    alone = speculator.without_memory()
    ours = {PLAIN: alone.without_drafter(), OURS: alone.without_drafter(lookup=True)}
    ours |= {DRAFTER: alone.with_lookup(False), BOTH: alone.with_lookup(True)} if drafter else {}
    known = {HF: ways.hf_arm(HF, model, decoding)}
    known[LOOKUP] = ways.hf_arm(
        LOOKUP, model, decoding, prompt_lookup_num_tokens=LOOKUP_TOKENS, max_matching_ngram_size=2
    )
    known |= {name: ways.our_arm(name, way, decoding) for name, way in ours.items()}
    return [arm for name, arm in known.items() if name in (HF, *(options.arms or ARMS))], speculator.verifier


def header(options: argparse.Namespace, verifier: Verifier, arms: list[Arm], tasks: list[Task]) -> dict[str, Any]:
    """What was measured and how; a file is gone on with only where all of ``settings`` are the same."""
    made = records.provenance(sys.argv, verifier.device.type)
    folder = options.speculator_path and Path(options.speculator_path).expanduser()
    settings = {
        "weights": verifier_fingerprint(verifier),
        "drafter": records.saved_fingerprint(folder) if folder and folder.is_dir() else options.speculator_path,
        "arms": [arm.name for arm in arms],
        "prompts": records.hash_of_tensors(task.prompt for task in tasks),
        "reply_tokens": options.reply_tokens,
        "dtype": options.dtype,
        "code": records.code_fingerprint(),
        **{name: made["versions"].get(name) for name in ("torch", "transformers")},
        **{name: made["hardware"][name] for name in ("device", "threads")},
    }
    return {"kind": "real", "model": options.model, "tasks": len(tasks), "settings": settings, **made}


def summarize(path: Path) -> int:
    """The tables of a file; 1 where a reply differs beyond a tie."""
    begun, *lines = records.read_records(path, growing=True)
    if begun.get("kind") != "real" or not lines:
        raise ValueError(f"{path} holds no task: expected a file that this benchmark has written")
    settings, rows, console = begun["settings"], task_rows(lines), Console()
    console.print(CIRCUMSTANCES.format(**begun, **settings, count=len(lines)), soft_wrap=True, highlight=False)
    console.print(terminal(rows, TASKS, left=("arm",), tight=True))
    console.print(terminal([row for row in rows if row.accepted_from(LOOKED_UP)], SOURCES, left=("arm",), tight=True))
    return 1 if any(verdict.outcome == BUG for row in rows for verdict in row.verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
