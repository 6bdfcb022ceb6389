"""``train_speculator.py`` and ``recurrent-drafter train``: options, text, targets, trainer, report."""

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as hf_logging

from recurrent_drafter.cli import quick
from recurrent_drafter.cli.callbacks import progress_bar
from recurrent_drafter.cli.errors import INTERRUPTED, parse, reporting
from recurrent_drafter.cli.estimating import estimate
from recurrent_drafter.cli.fit import facts, finish, fit, new_drafter, new_trainer, report_speedup
from recurrent_drafter.cli.output import checkpoint_to_resume, make_writable, saying_what_was_not_written
from recurrent_drafter.cli.speculator import open_drafter
from recurrent_drafter.records.provenance import EVALUATION
from recurrent_drafter.records.trackers import check_services, closing_trackers
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import Pair, held_out_replies, open_pair, training_text
from recurrent_drafter.training.run_record import RunRecord
from recurrent_drafter.training.targets import draft_vocabulary, make_targets


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter for a causal language model, or evaluate one."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = options(arguments)
    if args.demo:
        print(plan(args))
        return 0
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with ExitStack() as stack:
        if args.process_index > 0:  # one of several processes speaks
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        prepare(args)
        try:
            with saying_what_was_not_written(Path(str(args.output_dir))), closing_trackers():
                return run(args, ["train_speculator.py", *arguments], started)
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again; with --resume_from_checkpoint True it goes on from the "
                  f"last checkpoint in {args.output_dir}, if there is one", file=sys.stderr)  # fmt: skip
            return INTERRUPTED


def options(argv: Sequence[str]) -> TrainingArguments:
    """The command line as one checked set of options."""
    (args,) = parse(argv, main.__doc__ or "", TrainingArguments)
    assert isinstance(args, TrainingArguments)
    args.refuse_idle([word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word[:2] == "--"])
    return args


def run(args: TrainingArguments, argv: Sequence[str], started: float) -> int:
    """All stages, or as many as the phase has."""
    pair = open_pair(args)
    if args.phase == "eval":
        return evaluate(pair, args, argv)
    text = training_text(pair, args)
    if args.estimate:
        return estimate(pair, text, args)
    with progress_bar() as progress:
        if args.quick:
            targets = quick.quick_targets(pair, text, args, progress, started)
            quick.quick_schedule(args)
        else:
            targets = make_targets(pair, text, args, progress)
        held_out = held_out_replies(pair, args)
    drafter = new_drafter(pair, draft_vocabulary(pair, targets.sample, held_out, args), args)
    trainer = new_trainer(drafter, pair, targets, held_out, args)
    tags = ("recurrent-drafter", args.method)
    record = RunRecord(argv, tags, lambda: {"data": dataclasses.asdict(text.report)}, **facts(args))
    seconds = started + quick.QUICK_SECONDS - time.monotonic() if args.quick else None
    if fit(trainer, args, record, seconds):
        print(f"\ninterrupted at step {trainer.state.global_step}, which is kept in {args.output_dir}: run the "
              "same command with --resume_from_checkpoint True to go on", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    finish(trainer, pair, args, record, started)
    return 0


def evaluate(pair: Pair, args: TrainingArguments, argv: Sequence[str]) -> int:
    """``--phase eval``: the figures of training for a drafter that was saved, on the same data or on other."""
    drafter = open_drafter(str(args.drafter_name_or_path), pair.verifier, pair.tokenizer)
    held_out = held_out_replies(pair, args)
    trainer = new_trainer(drafter, pair, None, held_out, args)
    metrics = trainer.evaluate()
    for name, value in metrics.items():
        if isinstance(value, int | float):
            print(f"{name}: {value:g}")
    report_speedup(drafter, pair, metrics["eval_tokens_per_step"])
    if trainer.is_world_process_zero():
        data = args.eval_dataset_name or args.eval_dataset_path or args.dataset_name or args.dataset_path
        record = RunRecord(argv, ("recurrent-drafter", "eval"), drafter=args.drafter_name_or_path, dataset=data)
        record.write(Path(str(args.output_dir)), EVALUATION, metrics=metrics)
    return 0


def plan(args: TrainingArguments) -> str:
    """What would run, for ``--demo``."""
    source = args.dataset_path or args.dataset_name
    if args.phase == "eval":
        on = args.eval_dataset_path or args.eval_dataset_name or source
        return (
            f"would evaluate {args.drafter_name_or_path} with {args.llm_name_or_path} on held-out {on}; nothing was run"
        )
    if args.estimate:
        return f"would measure whether a drafter for {args.llm_name_or_path} on {source} can pay here; nothing was run"
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return (
        f"would train a drafter for {args.llm_name_or_path} on {source}"
        f"{', read as a stream' if args.streaming else ''}, targets: {args.method.replace('_', ' ')}"
        f"{' in assistant replies' if args.train_on_assistant_only else ''}, "
        f"{args.depths} tokens ahead, {args.drafter_num_layers} layers, draft vocabulary {args.draft_vocab_size}, "
        f"{'four minutes at most' if args.quick else length} in batches of {args.per_device_train_batch_size} at "
        f"{args.learning_rate:g}, report to {', '.join(args.report_to) or 'none'}, and save it to {args.output_dir}; "
        "nothing was trained"
    )


def prepare(args: TrainingArguments) -> None:
    """Settings that the drafter's trainer needs whatever the flags say, a place to write, and where to go on from.

    Raises ValueError or OSError now for what would otherwise end a training later.
    """
    check_services(args.report_to or (), get_available_reporting_integrations())
    args.remove_unused_columns = False
    args.disable_tqdm = True
    args.dataloader_pin_memory = torch.cuda.is_available()
    if args.estimate:
        return
    output = Path(str(args.output_dir))
    make_writable(output)
    args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, output)
