"""Training on HF Trainer: the drafter learns, the verifier stays frozen beside it (layer 3).

The methods differ in how targets are made (`make_examples`), not in the trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from recurrent_drafter.config import DraftShape
from recurrent_drafter.distill import with_distilled_targets
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.losses import IGNORED, combine_depths, depth_cross_entropy
from recurrent_drafter.replies import HeldOutReplies
from recurrent_drafter.rows import RootExample, collate, coverage, frequent_tokens, loss_mask, with_text_targets
from recurrent_drafter.time_budget import TimeBudget
from recurrent_drafter.verifier import Verifier

__all__ = [  # rows and clock among them, which training commands read with the trainer
    "DrafterTrainer",
    "Method",
    "RootExample",
    "TimeBudget",
    "TrainingOptions",
    "coverage",
    "frequent_tokens",
    "last_checkpoint",
    "loss_mask",
    "with_distilled_targets",
    "with_text_targets",
]
Method = Literal["ground_truth", "distilled", "knowledge_distillation"]


@dataclass
class TrainingOptions(TrainingArguments):
    """Every option of transformers' trainer; ``report_to`` takes several services on the command line."""

    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["none"], metadata={"help": "wandb, tensorboard, ... (as many as wanted), all or none"}
    )


class DrafterTrainer(Trainer):
    """HF Trainer with the drafter as its model.

    Args:
        verifier: frozen, outside the checkpoint.
        held_out: where `evaluate` walks; it reports ``eval_tokens_per_step`` at ``shape``.
        shape: of the drafts that `evaluate` walks with.
        method: what the examples' targets are: text, the verifier's own tokens, or text beside the verifier's law.
        kd_temperature: T of knowledge distillation.
        kd_alpha: weight of T^2 KL(teacher || student) against the text's cross-entropy.
        drafter_top_k: `evaluate` reports top-1 to top-k accuracy per depth.
        fingerprint: `run_fingerprint`, kept with every checkpoint; a checkpoint of another run is refused.
        gamma: weight of depth k is gamma^k.
        chunk: roots whose logits exist at the same time.
    """

    def __init__(
        self,
        model: RecurrentDrafter,
        args: TrainingArguments,
        *,
        verifier: Verifier,
        train_examples: Sequence[RootExample],
        held_out: HeldOutReplies | None,
        shape: DraftShape,
        method: Method = "ground_truth",
        kd_temperature: float = 4.0,
        kd_alpha: float = 0.7,
        drafter_top_k: int = 5,
        fingerprint: str | None = None,
        gamma: float = 1.0,
        chunk: int = 4096,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(train_examples),
            eval_dataset=held_out.replies if held_out is not None else None,  # only looked at for being there
            data_collator=collate,
            callbacks=callbacks,
        )
        self.drafter, self.verifier, self.held_out, self.shape = model, verifier, held_out, shape
        self.gamma, self.chunk = gamma, chunk
        self.method, self.kd_temperature, self.kd_alpha = method, kd_temperature, kd_alpha
        self.drafter_top_k, self.fingerprint = drafter_top_k, fingerprint
        verifier.model.requires_grad_(False)
        verifier.model.eval()
        outside = torch.full((verifier.vocab_size,), IGNORED)
        outside[model.draft_ids.cpu()] = torch.arange(len(model.draft_ids))
        self._draft_index = outside.to(verifier.device)  # (V,): the draft vocabulary's number of each token

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Cross-entropy of every depth at the roots of a batch; only roots are gathered, and only in chunks."""
        rows, positions, targets = inputs["rows"], inputs["positions"], inputs["targets"]
        with torch.no_grad():
            hiddens = self.verifier.hiddens(inputs["input_ids"], inputs["attention_mask"])[rows, positions - 1]
            read = torch.cat([inputs["input_ids"][rows, positions][:, None], targets[:, :-1]], dim=1).clamp(min=0)
            embedded = self.verifier.embed(read)  # (P, K, H)
            labels = torch.where(targets == IGNORED, IGNORED, self._draft_index[targets.clamp(min=0)])
        sums = self._chunked(model, hiddens, embedded, labels)
        loss = combine_depths(sums, (labels != IGNORED).sum(0), self.gamma)
        return (loss, {}) if return_outputs else loss

    def _chunked(self, model: Any, hiddens: Tensor, embedded: Tensor, labels: Tensor) -> Tensor:
        def part(hidden: Tensor, embedded: Tensor, labels: Tensor) -> Tensor:
            return depth_cross_entropy(model(hidden, embedded), labels)

        pieces = list(zip(*(x.split(self.chunk) for x in (hiddens, embedded, labels)), strict=True))
        if len(pieces) == 1:
            return part(*pieces[0])
        return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum(0)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Tokens per step of greedy decoding on the held-out replies, by the acceptance walk."""
        if self.held_out is None:
            raise ValueError("there are no held-out replies to evaluate on")
        training = self.drafter.training
        self.drafter.eval()
        value = self.held_out.tokens_per_step(self.drafter, self.shape)
        self.drafter.train(training)
        metrics = {f"{metric_key_prefix}_tokens_per_step": round(value, 4)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        mine = self.drafter.draft_ids.clone()
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            same = torch.equal(mine, self.drafter.draft_ids)
        except RuntimeError:  # a tensor of another shape
            same = False
        if not same:
            raise ValueError(
                f"{resume_from_checkpoint} is of another drafter or another draft vocabulary: resume with the model, "
                "data and flags that it was begun with"
            )


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a training, by time: an older run may have left higher numbers behind."""
    complete = directory.glob("checkpoint-*/trainer_state.json")  # what is written last
    newest = max(complete, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest and newest.parent
