"""What a training is made with: a new drafter, and the trainer of the method."""

from dataclasses import asdict
from typing import Any

import torch
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import tokenizer_hash, verifier_fingerprint
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import Pair
from recurrent_drafter.training.examples import run_fingerprint
from recurrent_drafter.training.loss import Distillation
from recurrent_drafter.training.targets import Material
from recurrent_drafter.training.trainer import DrafterTrainer, global_batch

FIXED = (  # from the beginning of a run to its end, however often it is resumed
    *("method", "seed", "kd_temperature", "kd_alpha", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
)


def default_shape(depths: int, draft_vocab_size: int) -> DraftShape:
    """What a drafter of K depths is evaluated and saved with."""
    width = min(3, draft_vocab_size)
    return DraftShape(beam_width=width, beam_length=depths, max_tree_nodes=min(12, 1 + width * depths))


def new_drafter(pair: Pair, draft_ids: torch.Tensor, args: TrainingArguments) -> RecurrentDrafter:
    """An untrained drafter for this verifier."""
    torch.manual_seed(args.seed)
    drafter = RecurrentDrafter(
        RecurrentDraftingConfig(
            hidden_size=pair.verifier.hidden_size,
            vocab_size=pair.verifier.vocab_size,
            exit_dim=args.exit_dim(pair.verifier.hidden_size),
            num_draft_layers=args.drafter_num_layers,
            rnn=args.rnn,
            emb_norm=args.emb_norm,
            draft_vocab_size=len(draft_ids),
            verifier_name_or_path=args.llm_name_or_path,
            verifier_architectures=pair.verifier.model.config.architectures,
            tokenizer_hash=tokenizer_hash(pair.tokenizer),
            **asdict(default_shape(args.depths, len(draft_ids))),
        )
    )
    drafter.draft_ids.copy_(draft_ids)
    return drafter


def new_trainer(
    drafter: RecurrentDrafter, material: Material, args: TrainingArguments, *callbacks: TrainerCallback
) -> DrafterTrainer:
    """A silent trainer by the chosen method; without examples it only evaluates."""
    taught = args.method == "knowledge_distillation"
    trainer = DrafterTrainer(
        drafter,
        args,
        verifier=material.pair.verifier,
        train_examples=material.train,
        held_out=material.held_out,
        shape=drafter.config.draft_shape,
        distillation=Distillation(args.kd_temperature, args.kd_alpha) if taught else None,
        drafter_top_k=args.drafter_top_k,
        fingerprint=fingerprint(drafter, material, args) if material.train else None,
        callbacks=list(callbacks),
    )
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    return trainer


def fingerprint(drafter: RecurrentDrafter, material: Material, args: TrainingArguments) -> str:
    """Of what must be the same when a training is resumed."""
    settings: dict[str, Any] = {name: str(getattr(args, name)) for name in FIXED}
    settings |= {"batch": global_batch(args), "drafter": drafter.config.to_diff_dict(), "streaming": args.streaming}
    return run_fingerprint(verifier_fingerprint(material.pair.verifier), material.sample, settings)
