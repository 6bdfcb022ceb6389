"""Third stage of a training: a drafter, the trainer, and what came of it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from recurrent_drafter.cli.callbacks import ShowProgress, StopWhenInterrupted, progress_bar
from recurrent_drafter.cli.output import save_drafter
from recurrent_drafter.data.batches import LengthGrouped, ShuffledStream
from recurrent_drafter.decoding.costs import Costs, measure_costs
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.estimate import break_even, predicted_speedup
from recurrent_drafter.measure.replies import HeldOutReplies
from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import tokenizer_hash, verifier_fingerprint
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.records.hashes import hash_of
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.budget import TimeBudget
from recurrent_drafter.training.corpus import Pair
from recurrent_drafter.training.examples import RootExample, run_fingerprint
from recurrent_drafter.training.options import BEST
from recurrent_drafter.training.run_record import RunRecord
from recurrent_drafter.training.targets import Targets, exit_dim, global_batch
from recurrent_drafter.training.trainer import DrafterTrainer

MEASURED_CONTEXT = 256  # tokens behind which steps are timed


class GroupedTrainer(DrafterTrainer):
    """The trainer with batches of similar lengths, and with a stream where there is one."""

    examples: Sequence[RootExample] = ()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        assert isinstance(args, TrainingArguments)
        if args.train_sampling_strategy != "group_by_length" or isinstance(self.train_dataset, ShuffledStream):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example.input_ids) for example in self.examples]
        return LengthGrouped(lengths, global_batch(args), args.seed)


def default_shape(depths: int, draft_vocab_size: int) -> DraftShape:
    """What a drafter of K depths is evaluated and saved with."""
    width = min(3, draft_vocab_size)
    return DraftShape(beam_width=width, beam_length=depths, max_tree_nodes=min(12, 1 + width * depths))


def new_drafter(pair: Pair, draft_ids: torch.Tensor, args: TrainingArguments) -> RecurrentDrafter:
    """An untrained drafter for this verifier."""
    torch.manual_seed(args.seed)
    shape = default_shape(args.depths, len(draft_ids))
    drafter = RecurrentDrafter(
        RecurrentDraftingConfig(
            hidden_size=pair.verifier.hidden_size,
            vocab_size=pair.verifier.vocab_size,
            exit_dim=exit_dim(pair, args),
            num_draft_layers=args.drafter_num_layers,
            rnn=args.rnn,
            emb_norm=args.emb_norm,
            draft_vocab_size=len(draft_ids),
            verifier_name_or_path=args.llm_name_or_path,
            verifier_architectures=pair.verifier.model.config.architectures,
            tokenizer_hash=tokenizer_hash(pair.tokenizer),
            beam_width=shape.beam_width,
            beam_length=shape.beam_length,
            max_tree_nodes=shape.max_tree_nodes,
        )
    )
    drafter.draft_ids.copy_(draft_ids)
    return drafter


def new_trainer(
    drafter: RecurrentDrafter,
    pair: Pair,
    targets: Targets | None,
    held_out: HeldOutReplies,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupedTrainer:
    """A silent trainer by the chosen method; without targets it only evaluates."""
    whole = targets is not None and not isinstance(targets.train, ShuffledStream)
    fingerprint = None
    if targets is not None:
        settings: dict[str, Any] = {
            name: str(getattr(args, name))
            for name in (
                *("method", "seed", "kd_temperature", "kd_alpha", "learning_rate", "lr_scheduler_type", "warmup_steps"),
                *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
            )
        }
        settings |= {"batch": global_batch(args), "drafter": drafter.config.to_diff_dict(), "streaming": args.streaming}
        fingerprint = run_fingerprint(verifier_fingerprint(pair.verifier), targets.sample, settings)
    trainer = GroupedTrainer(
        drafter,
        args,
        verifier=pair.verifier,
        train_examples=targets.sample if targets is not None and whole else [],
        held_out=held_out,
        shape=drafter.config.draft_shape,
        method=args.method,
        kd_temperature=args.kd_temperature,
        kd_alpha=args.kd_alpha,
        drafter_top_k=args.drafter_top_k,
        fingerprint=fingerprint,
        callbacks=list(callbacks),
    )
    if targets is not None:
        trainer.examples = targets.sample
        if not whole:
            trainer.train_dataset = targets.train  # type: ignore[assignment]
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    return trainer


def fit(trainer: GroupedTrainer, args: TrainingArguments, record: RunRecord, seconds: float | None) -> bool:
    """Train, for so many seconds if given; whether Ctrl-C ended it."""
    stop, budget = StopWhenInterrupted(), None
    callbacks: list[TrainerCallback] = [record, stop]
    if seconds is not None:
        budget = TimeBudget(seconds, args.learning_rate, evaluations=4)
        callbacks.append(budget)
    for callback in callbacks:
        trainer.add_callback(callback)
    with stop.listening(), progress_bar() as progress:
        trainer.add_callback(ShowProgress(progress, budget))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return stop.interrupted


def finish(trainer: GroupedTrainer, pair: Pair, args: TrainingArguments, record: RunRecord, started: float) -> None:
    """Save what was learnt, and say what it is worth here."""
    metrics, drafter = save_trained(trainer, args, record)
    if not trainer.is_world_process_zero():
        return
    minutes = (time.monotonic() - started) / 60
    tokens_per_step = metrics["eval_tokens_per_step"]
    print(f"held-out tokens per step: {tokens_per_step:.2f}; {minutes:.1f} minutes; saved to {args.output_dir}")
    report_speedup(drafter, pair, tokens_per_step)
    print(f"try it: python generate_speculator.py --base_model {args.llm_name_or_path} "
          f"--speculator_path {args.output_dir} --interactive")  # fmt: skip


def save_trained(
    trainer: GroupedTrainer, args: TrainingArguments, record: RunRecord
) -> tuple[dict[str, float], RecurrentDrafter]:
    """Evaluate the weights exactly as they are saved, and save them; the figures and the drafter.

    Trackers are told unless training evaluated at its last step: two figures of one step would be one too many.
    """
    with torch.no_grad():
        for parameter in trainer.drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    metrics, drafter = trainer.figures(), trainer._whole_drafter()
    if not any(BEST in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history):
        trainer.log(dict(metrics))
    drafter = drafter.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    if trainer.is_world_process_zero():
        output = Path(str(args.output_dir))
        save_drafter(drafter, output)
        record.write(output, metrics=metrics, history=trainer.state.log_history)
    return metrics, drafter


def report_speedup(drafter: RecurrentDrafter, pair: Pair, tokens_per_step: float) -> None:
    """Print what this acceptance is worth, from measured times."""
    costs, shape = measure(drafter, pair), drafter.config.draft_shape
    speed = predicted_speedup(costs, shape, tokens_per_step)
    print(
        f"predicted speed-up on this machine: {speed:.2f}x over plain decoding (a step of {shape.nodes} nodes and "
        f"{shape.beam_length} drafted tokens takes the time of {break_even(costs, shape):.2f} plain ones)"
    )
    if speed < 1:
        print("warning: drafting does not pay here at this shape; decoding falls back to plain steps by itself")


def measure(drafter: RecurrentDrafter, pair: Pair) -> Costs:
    """Times of real steps with this drafter, in the verifier's dtype."""
    verifier, shape = pair.verifier, drafter.config.draft_shape
    drafter = drafter.to(device=verifier.device, dtype=verifier.model.dtype).eval()  # type: ignore[arg-type, call-arg]
    context = min(MEASURED_CONTEXT, (verifier.context_length or MEASURED_CONTEXT + 32) - 32)
    with torch.inference_mode(), PackedLinears(verifier.model).applied(), PackedLinears(drafter).applied():
        draft = BeamDrafter(drafter, verifier.embed)
        return measure_costs(verifier, draft, max(context, 1), rows=(1, 2, 4, 8, 12, 16), widths=(shape.beam_width,))


def facts(args: TrainingArguments) -> dict[str, Any]:
    """What ``run.json`` and the trackers are told besides the trainer's own arguments."""
    options = {name: value for name, value in args.to_dict().items() if not name.startswith("_")}
    return {
        "verifier": args.llm_name_or_path,
        "method": args.method,
        "seed": args.seed,
        "settings_hash": hash_of(options),
        "options": options,
    }
