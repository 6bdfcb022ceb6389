"""A training from its verifier to the saved drafter; evaluating one again; and whether one could pay.

What ``recurrent-drafter train`` does, for a caller without a terminal: nothing here prints, exits or takes a signal.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as hf_logging

from recurrent_drafter.data.sources import DialogueLike
from recurrent_drafter.measure.estimate import break_even
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import check_pair, check_tokenizer, load_drafter, save_drafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import make_writable
from recurrent_drafter.records.provenance import EVALUATION
from recurrent_drafter.records.trackers import check_services, closing_trackers
from recurrent_drafter.training import callbacks
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.callbacks import OnProgress, Progress, RunRecord, ShouldStop, log_progress, never
from recurrent_drafter.training.checkpoints import checkpoint_to_resume, saying_what_was_not_written
from recurrent_drafter.training.corpus import Pair, held_out_replies, open_pair, training_text
from recurrent_drafter.training.estimation import TrainingEstimate, estimated, measured_costs
from recurrent_drafter.training.options import BEST
from recurrent_drafter.training.targets import Material, draft_vocabulary, make_examples, quick_examples, quick_schedule
from recurrent_drafter.training.trainer import DrafterTrainer, new_drafter, new_trainer

TAG = "recurrent-drafter"  # of every run at a tracker


@dataclass(frozen=True)
class TrainedDrafter:
    """What came of a training or an evaluation.

    Attributes:
        drafter: with the weights as they are saved, on the verifier's device.
        figures: along the held-out replies: ``tokens_per_step``, ``acceptance_pos1`` and so on; and by times measured
            here ``predicted_speedup`` over plain decoding and ``break_even``, the tokens per step from which on it pays
            (both in the first of several processes alone). Empty where training was stopped.
        folder: where drafter, checkpoints and ``run.json`` are.
        steps: how many training took.
        seconds: of all steps.
        history: what was logged during training, by step.
        finished: False where a stop request ended it; its checkpoint is in the folder, to be resumed.
    """

    drafter: RecurrentDrafter
    figures: dict[str, float]
    folder: Path
    steps: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    finished: bool = True


def train(
    verifier: PreTrainedModel | str,
    data: Sequence[DialogueLike] | None,
    arguments: TrainingArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_progress: OnProgress = log_progress,
    should_stop: ShouldStop = never,
    command: Sequence[str] = (),
) -> TrainedDrafter:
    """Train a drafter for this verifier, and save it in ``arguments.output_dir``.

    Args:
        verifier: a causal language model (whose parameters then ask for no gradients), or the name of one.
        data: conversations (`Dialogue`, or a record as files hold them: ``{"messages": [...]}``), texts
            (``{"text": ...}``) or prompts (strings, which the verifier answers first); all of one kind. One in twenty
            is held out. None reads the data set that the arguments name.
        arguments: every other option; they are not changed.
        tokenizer: the verifier's; not needed for a name.
        on_progress: called with each `Progress`, in every process; by default they are logged.
        should_stop: asked after every step; True ends training with a checkpoint, and
            ``arguments.resume_from_checkpoint = True`` goes on from it to the same weights.
        command: what ``run.json`` names as the command, if one began this.

    Raises ValueError or OSError, in one line, for whatever the caller can mend.
    """
    begun = time.monotonic()
    with _session(verifier, tokenizer, data, arguments, on_progress) as (args, pair):
        text = training_text(data, pair, args, on_progress)
        if args.quick:
            examples = quick_examples(pair, text, args, begun, on_progress)
        else:
            examples = make_examples(pair, text, args, on_progress)
        material = Material(pair, examples, held_out_replies(data, pair, args, on_progress))
        until = quick_schedule(args, begun) if args.quick else None
        record = RunRecord(command, (TAG, args.method), lambda: {"data": asdict(text.report)}, **callbacks.facts(args))
        trained = learn(material, args, record, on_progress=on_progress, should_stop=should_stop, until=until)
        return _with_speedup(trained, pair.verifier, args)


def evaluate(
    verifier: PreTrainedModel | str,
    drafter: RecurrentDrafter | str,
    data: Sequence[DialogueLike] | None,
    arguments: TrainingArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_progress: OnProgress = log_progress,
    command: Sequence[str] = (),
) -> TrainedDrafter:
    """The figures of training for a drafter (or its directory or hub name), on the same data or on other.

    ``evaluation.json`` in ``arguments.output_dir`` keeps them; the rest is as in `train`.
    """
    with _session(verifier, tokenizer, data, arguments, on_progress) as (args, pair):
        folder = Path(str(args.output_dir))
        name = drafter if isinstance(drafter, str) else drafter.name_or_path
        found = load_drafter(drafter, dtype=torch.float32) if isinstance(drafter, str) else drafter
        check_pair(found.config, pair.verifier.hidden_size, pair.verifier.vocab_size)
        check_tokenizer(str(found.name_or_path), found.config, pair.tokenizer)
        found.to(pair.verifier.device)  # type: ignore[arg-type]
        held_out = held_out_replies(data, pair, args, on_progress)
        metrics = new_trainer(found, Material(pair, (), held_out), args).evaluate()
        if args.process_index == 0:
            on = args.eval_dataset_name or args.eval_dataset_path or args.dataset_name or args.dataset_path
            record = RunRecord(command, (TAG, "eval"), drafter=name, dataset=on)
            record.write(folder, EVALUATION, metrics=metrics)
        return _with_speedup(TrainedDrafter(found, _figures(metrics), folder), pair.verifier, args)


def estimate(
    verifier: PreTrainedModel | str,
    data: Sequence[DialogueLike] | None,
    arguments: TrainingArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_progress: OnProgress = log_progress,
) -> TrainingEstimate:
    """Whether a drafter of this architecture can pay here, and what `train` would cost; trains and writes nothing."""
    with _session(verifier, tokenizer, data, arguments, on_progress, writes=False) as (args, pair):
        text = training_text(data, pair, args, on_progress)
        return estimated(text, Material(pair, (), held_out_replies(data, pair, args, on_progress)), args, on_progress)


def prepared(arguments: TrainingArguments, tell: OnProgress, *, writes: bool = True) -> TrainingArguments:
    """A copy with what the drafter's trainer needs whatever was asked for, and with the checkpoint to go on from.

    Raises ValueError or OSError now for what would otherwise end a training later.
    """
    check_services(arguments.report_to or (), get_available_reporting_integrations())
    args = copy.copy(arguments)
    args.remove_unused_columns = False
    args.disable_tqdm = True
    args.dataloader_pin_memory = torch.cuda.is_available()
    if writes:
        output, asked = Path(str(args.output_dir)), args.resume_from_checkpoint
        make_writable(output)
        args.resume_from_checkpoint = found = checkpoint_to_resume(asked, output)
        if str(asked).lower() == "true":
            none = f"no checkpoint in {output}: training begins anew"
            tell(Progress("data", f"going on from {found}" if found else none))
    return args


def learn(
    material: Material,
    args: TrainingArguments,
    record: RunRecord,
    *,
    on_progress: OnProgress,
    should_stop: ShouldStop = never,
    until: float | None = None,
) -> TrainedDrafter:
    """Train a new drafter on this material, up to a time of the monotonic clock if one is given, and save it."""
    drafter = new_drafter(material.pair, draft_vocabulary(material, args, on_progress), args)
    trainer, budget = new_trainer(drafter, material, args), None
    trainer.add_callback(record)
    if until is not None:
        budget = callbacks.TimeBudget(until - time.monotonic(), args.learning_rate, evaluations=4)
        trainer.add_callback(budget)
    trainer.add_callback(caller := callbacks.CallerAnswers(on_progress, should_stop, budget))
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds, steps, folder = time.monotonic() - begun, trainer.state.global_step, Path(str(args.output_dir))
    figures: dict[str, float] = {}
    if not caller.stopped:
        figures, drafter = save_trained(trainer, folder, record)
    history = tuple(trainer.state.log_history)
    return TrainedDrafter(drafter, figures, folder, steps, seconds, history, finished=not caller.stopped)


def save_trained(trainer: DrafterTrainer, folder: Path, record: RunRecord) -> tuple[dict[str, float], RecurrentDrafter]:
    """Evaluate the weights exactly as they are saved, and save them; the figures and the drafter.

    Trackers are told unless training evaluated at its last step: two figures of one step would be one too many.
    """
    with torch.no_grad():
        for parameter in trainer.drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics, drafter = trainer.figures(), trainer.whole_drafter()
    if not any(BEST in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history):
        trainer.log(dict(metrics))
    drafter = drafter.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    if trainer.is_world_process_zero():
        save_drafter(drafter, folder)
        record.write(folder, metrics=metrics, history=trainer.state.log_history)
    return _figures(metrics), drafter


@contextmanager
def _session(
    verifier: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Sequence[DialogueLike] | None,
    arguments: TrainingArguments,
    tell: OnProgress,
    *,
    writes: bool = True,
) -> Iterator[tuple[TrainingArguments, Pair]]:
    """Arguments `prepared` with verifier and data named as they were given, and the verifier opened.

    Within it transformers shows no bars, and what fails at a tracker or on a full disk is said in one line.
    """
    args = copy.copy(arguments)
    args.llm_name_or_path = verifier if isinstance(verifier, str) else verifier.name_or_path or None
    if data is not None:
        if args.streaming or args.dataset_path is not None:
            raise ValueError("data is given, and streaming and dataset_path are for files: leave them out")
        args.dataset_name = None
    args = prepared(args, tell, writes=writes)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with saying_what_was_not_written(Path(str(args.output_dir))), closing_trackers():
            yield args, open_pair(verifier, tokenizer, args)
    finally:
        if bars:
            hf_logging.enable_progress_bar()


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def _with_speedup(trained: TrainedDrafter, verifier: Verifier, args: TrainingArguments) -> TrainedDrafter:
    """With what its acceptance is worth here, from measured times: one of several processes measures."""
    if not trained.finished or args.process_index > 0:
        return trained
    least = break_even(measured_costs(trained.drafter, verifier), trained.drafter.config.draft_shape)
    worth = {"predicted_speedup": trained.figures["tokens_per_step"] / least, "break_even": least}
    return replace(trained, figures=trained.figures | worth)
