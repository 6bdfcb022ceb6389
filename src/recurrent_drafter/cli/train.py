"""``train_speculator.py`` and ``recurrent-drafter train``: the training library at the terminal."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console

from recurrent_drafter.cli.main import INTERRUPTED
from recurrent_drafter.cli.options.training import read_training
from recurrent_drafter.cli.parser import OptionParser
from recurrent_drafter.cli.progress import Meter
from recurrent_drafter.measure.estimate import best_lookup, expected_tokens
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.callbacks import Progress
from recurrent_drafter.training.estimation import STEPS, TrainingEstimate
from recurrent_drafter.training.options import TrainingOptions
from recurrent_drafter.training.pipeline import TrainedDrafter, estimate, evaluate, train

ATTAINABLE = 0.8  # acceptance per draft token that a good drafter can be hoped to have
GIB = 2**30
UNITS = {"training": "steps", "distilling": "conversations", "evaluation": "replies", "data": "replies"}
WORTH = ("predicted_speedup", "break_even")  # figures of this machine, beside those of the held-out replies


def run(own: TrainingOptions, *, argv: list[str]) -> int:
    started = time.monotonic()
    args = options(argv)
    if args.demo:
        print(plan(args))
        return 0
    # One of several processes speaks.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if args.process_index > 0 else sys.stdout):
        try:
            return do(args, ["train_speculator.py", *argv], started)
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again; with --resume_from_checkpoint True it goes on from the "
                  f"last checkpoint in {args.output_dir}, if there is one", file=sys.stderr)  # fmt: skip
            return INTERRUPTED


def options(argv: Sequence[str]) -> TrainingArguments:
    """The command line as one checked set of options."""
    read_training(OptionParser(TrainingOptions), argv)
    (args,) = OptionParser(TrainingArguments).options(argv)
    assert isinstance(args, TrainingArguments)
    return args


def do(args: TrainingArguments, command: Sequence[str], started: float) -> int:
    verifier = str(args.llm_name_or_path)
    with TrainingTerminal(speaks=args.process_index == 0) as terminal:
        if args.phase == "eval":
            drafter = str(args.drafter_name_or_path)
            trained = evaluate(verifier, drafter, None, args, on_progress=terminal, command=command)
            figures = {name: value for name, value in trained.figures.items() if name not in WORTH}
            lines = [*(f"eval_{name}: {value:g}" for name, value in figures.items()), *worth_lines(trained)]
        elif args.estimate:
            lines = [*estimate_lines(estimate(verifier, None, args, on_progress=terminal))]
        else:
            stop = terminal.should_stop
            trained = train(verifier, None, args, on_progress=terminal, should_stop=stop, command=command)
            if not trained.finished:
                print(f"\ninterrupted at step {trained.steps}, which is kept in {args.output_dir}: run the "
                      "same command with --resume_from_checkpoint True to go on", file=sys.stderr)  # fmt: skip
                return INTERRUPTED
            lines = [*training_lines(trained, args, (time.monotonic() - started) / 60)]
    if args.process_index == 0:
        print("\n".join(lines))
    return 0


class TrainingTerminal:
    """Prints a training's sentences, shows how far each phase is, and takes Ctrl-C as a wish once steps begin.

    The first Ctrl-C then ends training after the step at hand, with a checkpoint of it; a second one ends it at once.
    ``speaks``: one of several processes shows its phases.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not speaks)
        self.phase, self.meter = "", Meter("loading", console=self.console)
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> "TrainingTerminal":
        self.meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.meter.__exit__()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, progress: Progress) -> None:
        if progress.phase != self.phase:
            self._begin(progress)
        if progress.done is not None:
            self.meter.update(progress.done, progress.total, progress.text)
            if progress.phase == "training" and self._before is None:
                self._before = signal.signal(signal.SIGINT, self._note)
        elif progress.phase != "training" or self.meter.done is None or not self.console.is_terminal:
            print(progress.text, flush=True)  # of training, a terminal shows the same beside the bar

    def should_stop(self) -> bool:
        return self.interrupted

    def _begin(self, progress: Progress) -> None:
        """Show another phase; one by time is a share of the whole."""
        self.meter.__exit__()
        unit = "" if progress.total == 1.0 else UNITS.get(progress.phase, "")
        self.phase, self.meter = progress.phase, Meter(progress.phase, unit=unit, console=self.console)
        self.meter.__enter__()

    def _note(self, *_: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._before)


def training_lines(trained: TrainedDrafter, args: TrainingArguments, minutes: float) -> Iterator[str]:
    """What was learnt, where it is, and what it is worth here."""
    tokens, joined, alone = (trained.figures[f"tokens_per_step{kind}"] for kind in ("", "_with_lookup", "_of_lookup"))
    yield (
        f"held-out tokens per step: {tokens:.2f} (with lookup {joined:.2f}, lookup alone {alone:.2f}); "
        f"{minutes:.1f} minutes; saved to {args.output_dir}"
    )
    yield from worth_lines(trained)
    yield (
        f"try it: python generate_speculator.py --base_model {args.llm_name_or_path} "
        f"--speculator_path {args.output_dir} --interactive"
    )


def worth_lines(trained: TrainedDrafter) -> Iterator[str]:
    shape, (speedup, break_even) = trained.drafter.config.draft_shape, (trained.figures[name] for name in WORTH)
    yield (
        f"predicted speed-up on this machine: {speedup:.2f}x over plain decoding (a step of {shape.nodes} nodes and "
        f"{shape.beam_length} drafted tokens takes the time of {break_even:.2f} plain ones)"
    )
    if speedup < 1:
        yield "warning: drafting does not pay here at this shape; decoding falls back to plain steps by itself"


def estimate_lines(found: TrainingEstimate) -> Iterator[str]:
    """The times, the break-even of every draft length, the ceiling at several acceptances, and what training costs."""
    costs, plain = found.costs, found.costs.verify[0]
    relative = ", ".join(f"{n}: {t / plain:.2f}" for n, t in zip(costs.rows, costs.verify, strict=True))
    drafting = f"drafting, per token: {costs.draft_level / plain:.2f}"
    yield f"a plain step takes {plain * 1e3:.1f} ms; verifying n tokens, in plain steps: {relative}; {drafting}"
    gain, nodes = best_lookup(costs, found.lookup)
    yields = ", ".join(f"{n}: {tokens:.2f}" for n, tokens in found.lookup.items())
    yield f"lookup alone, for nothing, on held-out replies; tokens per step, by tokens verified: {yields}"
    yield f"  at best {gain:.2f}x the speed of plain decoding" + (
        f", with {nodes}" if nodes > 1 else ": it does not pay"
    )
    lengths = ", ".join(f"{length}: {tokens:.2f}" for length, tokens in enumerate(found.break_evens, start=1))
    yield f"break-even tokens per step, by draft length: {lengths}"
    yield "ceiling of the speed-up, by how often a draft token is accepted:"
    for rate in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        gain, levels = found.ceiling(rate)
        how = f"{levels} drafted, {expected_tokens(rate, levels):.2f} tokens per step" if levels else "plain decoding"
        yield f"  {rate:.0%}: {gain:.2f}x ({how})"
    if found.ceiling(1.0)[0] <= 1:
        yield "warning: it cannot pay here, not even if every draft token were accepted"
    elif found.ceiling(ATTAINABLE)[0] < 1.1:
        yield f"warning: at {ATTAINABLE:.0%} accepted, which a good drafter reaches, it gains less than a tenth here"
    whole = duration(found.steps * found.step_seconds)
    yield f"training: {found.steps:,.0f} steps of {found.step_seconds:.2f} s: {whole}, evaluations not counted"
    if found.distilled:
        yield f"distilling {found.distilled:,} conversations before that: {duration(found.distilled_seconds)}"
    yield (
        f"memory: {found.peak_bytes / GIB:.2f} GiB at the peak of {STEPS} steps, of which "
        f"{found.kept_bytes / GIB:.2f} are the verifier's weights and the drafter's with gradients and optimizer; "
        "nothing was trained"
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def plan(args: TrainingArguments) -> str:
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
