"""The process that does a reproduction's jobs: one verifier, one training or sweep after the other.

It is started by ``recurrent-drafter reproduce`` and is given a folder, which says everything else. Whatever it dies of
costs the job at hand; it is started again for the rest.
"""

import dataclasses
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import cache, partial
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as hf_logging

from recurrent_drafter.cli import train
from recurrent_drafter.cli.callbacks import progress_bar
from recurrent_drafter.cli.errors import reporting
from recurrent_drafter.cli.estimating import StepTimes
from recurrent_drafter.cli.fit import default_shape, facts, fit, measure, new_drafter, new_trainer, save_trained
from recurrent_drafter.core.metrics import Walk
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Decoding
from recurrent_drafter.measure.estimate import predicted_speedup
from recurrent_drafter.measure.replies import HeldOutReplies, load_replies, save_replies
from recurrent_drafter.measure.tuning import Search, measure_acceptance
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_drafter
from recurrent_drafter.records.provenance import provenance
from recurrent_drafter.records.trackers import closing_trackers
from recurrent_drafter.reproduce import sweeps
from recurrent_drafter.reproduce.plan import CALIBRATION, DEPTHS, Cell, Scope, Source, training_flags
from recurrent_drafter.reproduce.results import Record, Results, failure
from recurrent_drafter.reproduce.sweeps import vocabulary_sizes, with_fewer_tokens
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import TrainingText, open_pair, replies_to, training_text
from recurrent_drafter.training.examples import coverage, frequent_tokens
from recurrent_drafter.training.run_record import RunRecord
from recurrent_drafter.training.targets import Targets, draft_vocabulary, make_targets

TIMED_STEPS = 8  # of a calibration
ERROR = "error.txt"  # a failed job's traceback, in its folder


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Do the jobs of a reproduction's folder that have no outcome yet; 1 as soon as one of them fails."""
    (folder,) = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows what is going on
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    results = Results.from_folder(Path(folder))
    # The trainings' own arguments decide how processes are joined (--use_cpu), and `PartialState` is what they made.
    rank = train.options(training_flags(results.plan.showcase, results.options, results.folder)).process_index
    state = PartialState()
    parent, pending = os.getppid(), results.pending
    state.wait_for_everyone()  # before one of several processes changes what is pending
    with ExitStack() as stack:
        if rank > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        workshop = Workshop(results)
        for name in pending:
            if os.getppid() != parent:  # killed; somebody may have started it again
                return 1
            print(f"\n[{1 + results.plan.names.index(name)} of {len(results.plan.names)}] {name}")
            results.at_work.write_text(name)
            try:
                record = workshop.do(name)
            except Exception as error:  # noqa: BLE001  whatever a job dies of is its outcome
                results.path(name).mkdir(parents=True, exist_ok=True)
                (results.path(name) / ERROR).write_text(traceback.format_exc())
                results.write(name, failure(" ".join(f"{type(error).__name__}: {error}".split())))
                return 1
            if state.is_main_process:
                results.write(name, record)
    return 0


class Workshop:
    """A verifier, what it says to the held-out prompts, and the targets made so far."""

    def __init__(self, results: Results) -> None:
        self.results, self.options = results, results.options
        self.pair = open_pair(self.arguments(results.plan.showcase, steps=1))
        self.state = PartialState()
        self.held_out = {source.label: self._held_out(source) for source in self.options.evaluation_sets}
        self.text = cache(self._text)
        self.targets = cache(self._targets)

    def do(self, name: str) -> Record:
        """A job's outcome, with where it was made and how long it took."""
        begun = time.monotonic()
        jobs: dict[str, Callable[[], Record]] = {CALIBRATION: self.calibrate}
        jobs |= {cell.name: partial(self.train, cell) for cell in self.results.plan.cells}
        measured = {"shapes": self.shapes, "tree": self.tree, "vocabulary": self.vocabulary}
        jobs |= {sweep: partial(self.sweep, measured[sweep]) for sweep in self.results.plan.sweeps}
        outcome = jobs[name]()
        made = provenance(sys.argv, self.pair.verifier.device.type)
        return {"status": "finished", **outcome, "seconds": time.monotonic() - begun, "made": made}

    def arguments(self, cell: Cell, folder: Path | None = None, steps: int | None = None) -> TrainingArguments:
        """A cell's training as ``train_speculator.py`` would be told; its length by calibration, if not given."""
        steps = self.results.steps if steps is None else steps
        return train.options(training_flags(cell, self.options, folder or self.results.path(cell.name), steps))

    def _held_out(self, source: Source) -> HeldOutReplies:
        """The verifier's replies to a set's held-out prompts: made once, the same for every training."""
        kept = self.results.folder / "replies" / f"{source.label}.safetensors"
        if kept.exists():
            return HeldOutReplies(self.pair.verifier, load_replies(kept))
        split = source.held_out_split(self.options.training_sets)
        loaded = load_dialogues(source.name, source.path, split)
        options = self.options
        counts = options.given("eval_max_examples"), options.given("eval_max_new_tokens")
        replies = replies_to(self.pair, loaded, *counts, self.pair.end_ids)
        if self.state.is_main_process:
            kept.parent.mkdir(exist_ok=True)
            save_replies(kept, replies)
        return HeldOutReplies(self.pair.verifier, replies)

    def _text(self, label: str) -> TrainingText:
        """A training set's conversations, as many as are asked for."""
        cell = next(cell for cell in self.results.plan.cells if cell.training_set == label)
        text = training_text(self.pair, self.arguments(cell, steps=1))
        return TrainingText(list(text.dialogues)[: self.options.max_examples], text.account)

    def _targets(self, label: str, scope: Scope, distilled: bool) -> Targets:
        """Examples with targets: made once for all seeds, distilled ones kept on disk."""
        cell = Cell("distilled" if distilled else "ground_truth", scope, label, seed=0)
        arguments = self.arguments(cell, self.results.folder / "targets", steps=1)
        with progress_bar() as progress:
            return make_targets(self.pair, self.text(label), arguments, progress)

    def calibrate(self) -> Record:
        """How many steps a training takes in --cell_seconds, on average over the trainings of the grid.

        Steps are made equal, and not seconds: what else runs on a machine would decide between methods. What a step
        costs depends on the scope, and on whether the verifier's distributions are learnt; each kind is timed.
        """
        kinds: dict[tuple[str, bool], float] = {}
        for cell in self.results.plan.cells:
            kind = cell.scope, cell.method == "knowledge_distillation"
            if kind not in kinds:
                kinds[kind] = self.step_seconds(cell)
        times = [kinds[cell.scope, cell.method == "knowledge_distillation"] for cell in self.results.plan.cells]
        mean = sum(times) / len(times)
        steps = max(round(self.options.given("cell_seconds") / mean), 1)
        print(f"a step takes {mean:.2f} s: every training takes {steps:,} steps")
        return {"kind": CALIBRATION, "step_seconds": mean, "max_steps": steps}

    def step_seconds(self, cell: Cell) -> float:
        """The median step of a training that learns nothing; targets are the text, whose steps cost as much as any."""
        with tempfile.TemporaryDirectory() as nowhere:
            arguments = self.arguments(cell, Path(nowhere), steps=TIMED_STEPS)
            train.prepare(arguments)
            brief = dataclasses.replace(
                arguments, max_steps=TIMED_STEPS, learning_rate=0.0, eval_strategy="no", report_to=["none"]
            )
            targets, timed = self.targets(cell.training_set, cell.scope, False), StepTimes()
            first = next(iter(self.held_out.values()))
            drafter = new_drafter(self.pair, draft_vocabulary(self.pair, targets.sample, first, brief), brief)
            new_trainer(drafter, self.pair, targets, first, brief, [timed]).train()
        return timed.median

    def train(self, cell: Cell) -> Record:
        """Train a drafter from the beginning, and walk it along the held-out replies."""
        folder = self.results.path(cell.name)
        if self.state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
        self.state.wait_for_everyone()
        arguments = self.arguments(cell)
        train.prepare(arguments)
        begun = time.monotonic()
        targets = self.targets(cell.training_set, cell.scope, cell.method == "distilled")
        targets_seconds = time.monotonic() - begun
        first = next(iter(self.held_out.values()))
        drafter = new_drafter(self.pair, draft_vocabulary(self.pair, targets.sample, first, arguments), arguments)
        trainer = new_trainer(drafter, self.pair, targets, first, arguments)
        tags, data = ("recurrent-drafter", "reproduce", cell.method), self.text(cell.training_set)
        record = RunRecord(sys.argv, tags, lambda: {"data": dataclasses.asdict(data.report)}, **facts(arguments))
        begun = time.monotonic()
        with closing_trackers():
            if fit(trainer, arguments, record, seconds=None):
                raise KeyboardInterrupt
        seconds = time.monotonic() - begun
        save_trained(trainer, arguments, record)
        history = trainer.state.log_history
        return {
            "kind": "training",
            **dataclasses.asdict(cell),
            "steps": trainer.state.global_step,
            "train_seconds": seconds,
            "targets_seconds": targets_seconds,
            "texts": len(targets.sample),
            "roots": sum(len(example.positions) for example in targets.sample),
            "draft_vocab_size": len(drafter.draft_ids),
            "coverage": coverage(targets.sample, drafter.draft_ids.cpu()),
            "evaluations": self.evaluate(folder) if self.state.is_main_process else [],
            "curve": [
                {"step": entry["step"], "tokens_per_step": entry["eval_tokens_per_step"]}
                for entry in history
                if "eval_tokens_per_step" in entry
            ],
        }

    def drafter(self, folder: Path) -> RecurrentDrafter:
        """A drafter as decoding would load it."""
        verifier = self.pair.verifier
        return load_drafter(folder, dtype=verifier.model.dtype).to(verifier.device).eval()  # type: ignore[arg-type]

    def evaluate(self, folder: Path) -> list[Record]:
        """Every reply's walk, on all sets, at all widths, with the whole tree."""
        drafter = self.drafter(folder)
        found = []
        for label, held_out in self.held_out.items():
            for width in self.options.eval_widths:
                nodes = 1 + width * DEPTHS
                walks = measure_acceptance(held_out, drafter, width, DEPTHS).walks(DEPTHS, nodes)
                shape = {"beam_width": width, "beam_length": DEPTHS, "nodes": nodes}
                found.append({"set": label, **shape, **sweeps.counts(walks)})
        return found

    def sweep(self, measured: Callable[[RecurrentDrafter], Record]) -> Record:
        """One sweep, with the last drafter of the grid and weights packed as they are while decoding."""
        if not self.state.is_main_process:
            return {}
        cell = self.results.plan.showcase
        if self.results.failed(cell.name):
            raise ValueError(f"the drafter that it takes was not trained: {cell.name} has failed")
        drafter = self.drafter(self.results.path(cell.name))
        dtype = str(self.pair.verifier.model.dtype).removeprefix("torch.")
        return {"kind": measured.__name__, "drafter": cell.name, "dtype": dtype, **measured(drafter)}

    def shapes(self, drafter: RecurrentDrafter) -> Record:
        """Beam widths and lengths at every batch size, by `tune`'s own measurements."""
        options, held_out = self.options, next(iter(self.held_out.values()))
        prompts = [reply.prompt for reply in held_out.replies][: options.given("sweep_prompts")]
        sizes = [1, *(size for size in options.given("batch_size") if 1 < size <= len(prompts))]
        widths = [width for width in options.given("widths") if width <= len(drafter.draft_ids)]
        speculator = RecurrentDraftingSpeculator(drafter)
        speculator.attach_verifier(self.pair.verifier.model)
        decoding = Decoding(options.given("eval_max_new_tokens"))
        with Progress(console=Console(), transient=True) as progress:
            search = Search(
                speculator, prompts, decoding, sizes, widths, options.given("lengths"), confirm=2,
                tracked=lambda things, said: progress.track(things, description=said),
            )  # fmt: skip
            return sweeps.shapes(search, held_out)

    def tree(self, drafter: RecurrentDrafter) -> Record:
        """What merging the beams' prefixes saves."""
        widths = [width for width in self.options.given("widths") if 1 < width <= len(drafter.draft_ids)]
        return sweeps.tree(next(iter(self.held_out.values())), drafter, widths, DEPTHS)

    def vocabulary(self, drafter: RecurrentDrafter) -> Record:
        """The same drafter with ever fewer tokens that it can draft, the most frequent ones."""
        verifier, held_out, cell = self.pair.verifier, next(iter(self.held_out.values())), self.results.plan.showcase
        examples = self.targets(cell.training_set, cell.scope, cell.method == "distilled").sample
        shape, rows = default_shape(DEPTHS, len(drafter.draft_ids)), []
        for size in vocabulary_sizes(len(drafter.draft_ids)):
            kept = frequent_tokens(examples, size, verifier.vocab_size, self.pair.end_ids)
            smaller = with_fewer_tokens(drafter, kept)
            walks = measure_acceptance(held_out, smaller, shape.beam_width, shape.beam_length).walks(
                shape.beam_length, shape.nodes
            )
            costs = measure(smaller, self.pair)
            speed = predicted_speedup(costs, shape, sum(walks, Walk(0, 0)).tokens_per_step)
            cost = {"draft_level": costs.draft_level, "plain_step": costs.verify[0], "predicted_speedup": speed}
            rows.append({"size": size, "coverage": coverage(examples, kept), **cost, **sweeps.counts(walks)})
        return {"rows": rows, **dataclasses.asdict(shape)}


if __name__ == "__main__":
    sys.exit(main(None))
