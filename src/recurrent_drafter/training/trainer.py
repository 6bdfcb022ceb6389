"""Training on HF Trainer: the drafter learns, the verifier stays frozen beside it.

The methods differ in how targets are made (`targets`), not in the trainer.
"""

from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from recurrent_drafter.data.batches import LengthGrouped, ShuffledStream
from recurrent_drafter.measure.replies import HeldOutReplies
from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import tokenizer_hash, verifier_fingerprint
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.arguments import TrainingArguments, global_batch
from recurrent_drafter.training.checkpoints import WholeCheckpoints
from recurrent_drafter.training.corpus import Pair
from recurrent_drafter.training.examples import collate, run_fingerprint
from recurrent_drafter.training.loss import Distillation, Objective, roots_at_a_time
from recurrent_drafter.training.targets import Examples, Material

FIXED = (  # from the beginning of a run to its end, however often it is resumed
    *("method", "seed", "kd_temperature", "kd_alpha", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
)


class DrafterTrainer(WholeCheckpoints):
    """HF Trainer with the drafter as its model.

    Several processes (``torchrun``, ``accelerate launch``) train as one does on their joint batches: a step's loss is
    the mean over all of its targets, however they are spread. FSDP (version 2 with full state dicts, transformers'
    defaults) shards the drafter and, while it trains, the verifier's layers; a teacher, which each process asks as
    often as its own roots need, stays whole.

    Args:
        verifier: frozen, outside the checkpoint.
        train_examples: all of them, or a stream of them, which numbers them itself.
        held_out: where `evaluate` walks; it reports ``eval_tokens_per_step`` at ``shape``.
        shape: of the drafts that `evaluate` walks with.
        distillation: learn the verifier's law along the text too; None: the targets alone, whoever made them.
        drafter_top_k: `evaluate` reports top-1 to top-k accuracy per depth.
        fingerprint: `run_fingerprint`, kept with every checkpoint; a checkpoint of another run is refused.
        gamma: weight of depth k is gamma^k.
        chunk: roots whose logits exist at the same time; by default what memory affords.

    Raises ValueError, naming the step and the examples, as soon as a loss is not a number.
    """

    loss_is_scaled_for_ga = True  # by the counts of all of a step's batches

    def __init__(
        self,
        model: RecurrentDrafter,
        args: transformers.TrainingArguments,
        *,
        verifier: Verifier,
        train_examples: Examples,
        held_out: HeldOutReplies | None,
        shape: DraftShape,
        distillation: Distillation | None = None,
        drafter_top_k: int = 5,
        fingerprint: str | None = None,
        gamma: float = 1.0,
        chunk: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if not isinstance(train_examples, ShuffledStream):
            train_examples = [replace(example, number=number) for number, example in enumerate(train_examples)]
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # all are used at every step; to look for others costs time
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_examples,  # type: ignore[arg-type]
            eval_dataset=held_out.replies if held_out is not None else None,  # only looked at for being there
            data_collator=collate,
            callbacks=callbacks,
        )
        self._check_sharding()
        self.drafter, self.verifier, self.held_out, self.shape = model, verifier, held_out, shape
        self.drafter_top_k, self.fingerprint, self.chunk = drafter_top_k, fingerprint, chunk
        verifier.model.requires_grad_(False)
        verifier.model.eval()
        self.objective: Objective = Objective(verifier, model.draft_ids.clone(), gamma, distillation)
        self._targets = torch.zeros(2, dtype=torch.int64, device=verifier.device)  # and those in D, since the last log

    def train(self, *args: Any, **options: Any) -> Any:
        """As Trainer does, on a verifier that is sharded where the drafter is."""
        shared = self.is_fsdp_enabled and self.objective.distillation is None
        with self.verifier.sharded() if shared else nullcontext():
            return super().train(*args, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches of like length where they are asked for; the order depends on a step's batch and the seed alone."""
        if self.args.train_sampling_strategy != "group_by_length" or isinstance(self.train_dataset, ShuffledStream):
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example) for example in self.train_dataset]  # type: ignore[union-attr]
        return LengthGrouped(lengths, global_batch(self.args), self.args.seed)

    def _check_sharding(self) -> None:
        if self.args.fsdp and not self.is_fsdp_enabled:  # accelerate would train unsharded and say nothing
            raise ValueError("--fsdp shards a drafter on accelerators, and here is a CPU: leave it out")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                "a drafter is sharded by FSDP version 2 and saved whole: give --fsdp alone, or an --fsdp_config with "
                "version 2 and state_dict_type FULL_STATE_DICT"
            )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """Targets per depth of all batches and processes of a step, and those in D (2, K): what means are over."""
        if not batch_samples:
            return None
        counts = torch.stack([self.objective.counts(batch["targets"]) for batch in batch_samples]).sum(0)
        counts = self.accelerator.reduce(counts.to(device), reduction="sum")
        self._targets += counts.sum(1)
        return counts

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This batch's share of a step's loss; only roots are gathered, and their logits exist in chunks."""
        counts = self.objective.counts(inputs["targets"]) if num_items_in_batch is None else num_items_in_batch
        rows = self.objective.rows(inputs, self.drafter.dtype)
        chunk = self.chunk or roots_at_a_time(self.objective.draft_ids, rows.labels.shape[1])
        loss = model(rows.hidden, rows.embedded, self.objective.chunk_loss(rows, counts), chunk)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, this makes them a sum
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """One batch, forward and backward. Raises ValueError where its loss is not a number."""
        numbers = inputs["numbers"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on training examples "
                f"{', '.join(map(str, numbers.tolist()))}: {self.advice()}"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer does, with the share of targets that the draft vocabulary lacks."""
        if "loss" in logs and self._targets[0] > 0:
            every, inside = self._targets.tolist()
            logs["targets_outside_draft_vocab"] = 1 - inside / every
            self._targets.zero_()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Acceptance along the held-out replies, as `HeldOutReplies.measure` names it, with a prefix.

        ``eval_tokens_per_step`` is what to choose the best checkpoint and to stop early by, greater being better.
        """
        metrics = self.figures(metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def figures(self, prefix: str = "eval") -> dict[str, float]:
        """What `evaluate` reports, without telling the trackers; all processes take part and are given the same."""
        if self.held_out is None:
            raise ValueError("there are no held-out replies to evaluate on")
        drafter = self.whole_drafter()
        measured: list[dict[str, float]] = [{}]
        if self.accelerator.is_main_process:
            training = drafter.training
            measured = [self.held_out.measure(drafter.eval(), self.shape, self.drafter_top_k)]
            drafter.train(training)
        if self.accelerator.num_processes > 1:  # all must come to the same decisions
            broadcast_object_list(measured)
        return {f"{prefix}_{name}": value for name, value in measured[0].items()}

    def whole_drafter(self) -> RecurrentDrafter:
        """The drafter, put together on the main process where it is sharded."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return self.drafter
        state = self.accelerator.get_state_dict(self.model_wrapped)
        whole = RecurrentDrafter(self.drafter.config)
        if self.accelerator.is_main_process:
            whole.load_state_dict(state)
        return whole.to(self.verifier.device)  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            same = torch.equal(self.objective.draft_ids, self.drafter.draft_ids)
        except RuntimeError:  # a tensor of another shape
            same = False
        if not same:
            raise ValueError(
                f"{resume_from_checkpoint} is of another drafter or another draft vocabulary: resume with the model, "
                "data and flags that it was begun with"
            )


def default_shape(depths: int, draft_vocab_size: int) -> DraftShape:
    """What a drafter of K depths is evaluated and saved with."""
    width = min(3, draft_vocab_size)
    return DraftShape(beam_width=width, beam_length=depths, max_tree_nodes=min(12, 1 + width * depths))


def new_drafter(pair: Pair, draft_ids: torch.Tensor, args: TrainingArguments) -> RecurrentDrafter:
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
