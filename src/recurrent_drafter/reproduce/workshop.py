"""The jobs of a reproduction: one verifier, one training or sweep after the other."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from accelerate import PartialState

from recurrent_drafter.data.sources import LoadedDialogues, load_dialogues
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Decoding
from recurrent_drafter.measure.replies import HeldOutReplies, load_replies, save_replies
from recurrent_drafter.measure.tuning import Search, Tracked, measure_acceptance
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_drafter
from recurrent_drafter.records.provenance import provenance
from recurrent_drafter.records.trackers import closing_trackers
from recurrent_drafter.reproduce.plan import CALIBRATION, DEPTHS, Cell, Scope, Source, training_flags
from recurrent_drafter.reproduce.results import Record, Results
from recurrent_drafter.reproduce.sweeps import sweep_of_shapes, sweep_of_trees, sweep_of_vocabularies, walked
from recurrent_drafter.training import callbacks, corpus, estimation, pipeline, targets
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.callbacks import OnProgress, Progress, ShouldStop, log_progress, never
from recurrent_drafter.training.examples import coverage

TIMED_STEPS = 8  # of a calibration


class Workshop:
    """A verifier, what it says to the held-out prompts, and the targets made so far.

    ``flags`` reads flags of ``train_speculator.py``, which say what a training is; ``tracked`` shows how far a sweep
    is; ``tell`` is told what is prepared now, before the first job brings its own; records name ``argv``.
    """

    def __init__(
        self,
        results: Results,
        flags: Callable[[list[str]], TrainingArguments],
        tracked: Tracked,
        tell: OnProgress = log_progress,
        argv: Sequence[str] = (),
    ) -> None:
        self.results, self.options, self.flags, self.tracked = results, results.options, flags, tracked
        self.tell, self.should_stop, self.argv = tell, never, argv
        arguments = self.arguments(results.plan.showcase, steps=1)
        self.pair = corpus.open_pair(str(arguments.llm_name_or_path), None, arguments)
        self.state = PartialState()
        self.held_out = {source.label: self._held_out(source) for source in self.options.evaluation_sets}
        self.text = cache(self._text)
        self.material = cache(self._material)

    @property
    def first_held_out(self) -> HeldOutReplies:
        """The replies that trainings are evaluated along while they train, and that sweeps use."""
        return next(iter(self.held_out.values()))

    def do(self, name: str, tell: OnProgress, should_stop: ShouldStop) -> Record:
        """A job's outcome, with where it was made and how long it took."""
        begun, self.tell, self.should_stop = time.monotonic(), tell, should_stop
        cells = {cell.name: cell for cell in self.results.plan.cells}
        if name == CALIBRATION:
            outcome = self.calibrate()
        else:
            outcome = self.train(cells[name]) if name in cells else self.sweep(name)
        made = provenance(self.argv, self.pair.verifier.device.type)
        return {"status": "finished", **outcome, "seconds": time.monotonic() - begun, "made": made}

    def arguments(self, cell: Cell, folder: Path | None = None, steps: int | None = None) -> TrainingArguments:
        """A cell's training as ``train_speculator.py`` would be told; its length by calibration, if not given."""
        steps = self.results.steps if steps is None else steps
        return self.flags(training_flags(cell, self.options, folder or self.results.path(cell.name), steps))

    def _held_out(self, source: Source) -> HeldOutReplies:
        """The verifier's replies to a set's held-out prompts: made once, the same for every training."""
        kept = self.results.folder / "replies" / f"{source.label}.safetensors"
        if kept.exists():
            return HeldOutReplies(self.pair.verifier, load_replies(kept))
        split = source.held_out_split(self.options.training_sets)
        loaded = load_dialogues(source.name, source.path, split)
        counts = self.options.eval_max_examples, self.options.eval_max_new_tokens
        replies = corpus.replies_to(self.pair, loaded, *counts, self.pair.end_ids, self.tell)
        if self.state.is_main_process:
            kept.parent.mkdir(exist_ok=True)
            save_replies(kept, replies)
        return HeldOutReplies(self.pair.verifier, replies)

    def _text(self, label: str) -> LoadedDialogues:
        """A training set's conversations, as many as are asked for."""
        cell = next(cell for cell in self.results.plan.cells if cell.training_set == label)
        text = corpus.training_text(None, self.pair, self.arguments(cell, steps=1), self.tell)
        return LoadedDialogues(tuple(text)[: self.options.max_examples], text.report)

    def _material(self, label: str, scope: Scope, distilled: bool) -> targets.Material:
        """Examples with targets: made once for all seeds, distilled ones kept on disk."""
        cell = Cell(label, scope, "distilled" if distilled else "ground_truth", rnn=True, seed=0)
        arguments = self.arguments(cell, self.results.folder / "targets", steps=1)
        examples = targets.make_examples(self.pair, self.text(label), arguments, self.tell)
        return targets.Material(self.pair, examples, self.first_held_out)

    def calibrate(self) -> Record:
        """How many steps a training takes in --cell_seconds, on average over the trainings of the grid.

        Steps are made equal, and not seconds: what else runs on a machine would decide between methods. What a step
        costs depends on the scope, and on whether the verifier's distributions are learnt; each kind is timed.
        """
        assert self.options.cell_seconds is not None
        seconds: dict[tuple[str, bool], float] = {}
        kinds = [(cell.scope, cell.method == "knowledge_distillation") for cell in self.results.plan.cells]
        for kind, cell in zip(kinds, self.results.plan.cells, strict=True):
            if kind not in seconds:
                seconds[kind] = self.step_seconds(cell)
        mean = sum(seconds[kind] for kind in kinds) / len(kinds)
        steps = max(round(self.options.cell_seconds / mean), 1)
        self.tell(Progress("training", f"a step takes {mean:.2f} s: every training takes {steps:,} steps"))
        return {"kind": CALIBRATION, "step_seconds": mean, "max_steps": steps}

    def step_seconds(self, cell: Cell) -> float:
        """The median step of a training that learns nothing; targets are the text, whose steps cost as much as any."""
        with tempfile.TemporaryDirectory() as nowhere:
            arguments = self.arguments(cell, Path(nowhere), steps=TIMED_STEPS)
            arguments = pipeline.prepared(arguments, self.tell, writes=False)
            material = self.material(cell.training_set, cell.scope, False)
            draft_ids = targets.draft_vocabulary(material, arguments, self.tell)
            return estimation.step_seconds(material, draft_ids, arguments, TIMED_STEPS)

    def train(self, cell: Cell) -> Record:
        """Train a drafter from the beginning, and walk it along the held-out replies."""
        folder = self.results.path(cell.name)
        if self.state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
        self.state.wait_for_everyone()
        arguments = pipeline.prepared(self.arguments(cell), self.tell)
        begun = time.monotonic()
        material = self.material(cell.training_set, cell.scope, cell.method == "distilled")
        targets_seconds = time.monotonic() - begun
        account = asdict(self.text(cell.training_set).report)
        tags = (pipeline.TAG, "reproduce", cell.method)
        record = callbacks.RunRecord(self.argv, tags, data=account, **callbacks.facts(arguments))
        with closing_trackers():
            trained = pipeline.learn(material, arguments, record, on_progress=self.tell, should_stop=self.should_stop)
        if not trained.finished:
            raise KeyboardInterrupt
        draft_ids = trained.drafter.draft_ids.cpu()
        return {
            "kind": "training",
            **asdict(cell),
            "steps": trained.steps,
            "train_seconds": trained.seconds,
            "targets_seconds": targets_seconds,
            "texts": len(material.sample),
            "roots": sum(len(example.positions) for example in material.sample),
            "draft_vocab_size": len(draft_ids),
            "coverage": coverage(material.sample, draft_ids),
            "evaluations": self.evaluate(folder) if self.state.is_main_process else [],
            "curve": [
                {"step": entry["step"], "tokens_per_step": entry["eval_tokens_per_step"]}
                for entry in trained.history
                if "eval_tokens_per_step" in entry
            ],
        }

    def drafter(self, folder: Path) -> RecurrentDrafter:
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
                found.append({"set": label, **shape, **walked(walks)})
        return found

    def sweep(self, name: str) -> Record:
        """One sweep, with the last drafter of the grid and weights packed as they are while decoding."""
        if not self.state.is_main_process:
            return {}
        cell = self.results.plan.showcase
        if self.results.failed(cell.name):
            raise ValueError(f"the drafter that it takes was not trained: {cell.name} has failed")
        drafter, held_out = self.drafter(self.results.path(cell.name)), self.first_held_out
        if name == "shapes":
            found = sweep_of_shapes(self.search(drafter), held_out)
        elif name == "tree":
            found = sweep_of_trees(held_out, drafter, self.options.widths)
        else:
            examples = self.material(cell.training_set, cell.scope, cell.method == "distilled").sample
            found = sweep_of_vocabularies(held_out, drafter, examples, self.pair.end_ids)
        dtype = str(self.pair.verifier.model.dtype).removeprefix("torch.")
        return {"kind": name, "drafter": cell.name, "dtype": dtype, **found}

    def search(self, drafter: RecurrentDrafter) -> Search:
        options, speculator = self.options, RecurrentDraftingSpeculator(drafter, lookup=False)
        speculator.attach_verifier(self.pair.verifier.model)
        prompts = [reply.prompt for reply in self.first_held_out.replies][: options.sweep_prompts]
        sizes = [1, *(size for size in options.batch_size if 1 < size <= len(prompts))]
        widths = [width for width in options.widths if width <= len(drafter.draft_ids)]
        decoding = Decoding(options.eval_max_new_tokens)
        return Search(speculator, prompts, decoding, sizes, widths, options.lengths, 2, self.tracked)
