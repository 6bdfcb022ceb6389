"""Training on HF Trainer: the drafter learns, the verifier stays frozen beside it (layer 3).

The methods differ in how targets are made (`make_examples`), not in the trainer.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from recurrent_drafter.config import DraftShape
from recurrent_drafter.data import TrainExample
from recurrent_drafter.distill import distilled_targets, text_targets
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.losses import IGNORED, combine_depths, depth_cross_entropy
from recurrent_drafter.replies import HeldOutReplies
from recurrent_drafter.verifier import Verifier


@dataclass(frozen=True)
class RootExample:
    """A text (S,), the positions of its roots (P,) and the K targets of each root (P, K), `IGNORED` where none."""

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def loss_mask(example: TrainExample, end_ids: Sequence[int]) -> Tensor:  # (S,) bool
    """Which positions are roots: tokens the verifier would have to generate, but not an end token, nor the first."""
    mask = (example.span_ids >= 0) & ~torch.isin(example.input_ids, torch.tensor(list(end_ids)))
    mask[0] = False  # nothing precedes it, so no hidden state predicted it
    return mask


def with_text_targets(example: TrainExample, depths: int, end_ids: Sequence[int]) -> RootExample:
    """Ground truth: each root's targets are the text that follows it."""
    roots = loss_mask(example, end_ids)
    targets = text_targets(example.input_ids, example.span_ids, roots, depths, tuple(end_ids))
    return RootExample(example.input_ids, roots.nonzero()[:, 0], targets)


def with_distilled_targets(
    verifier: Verifier, example: TrainExample, depths: int, end_ids: Sequence[int]
) -> RootExample:
    """The paper's distilled dataset: each root's targets are the verifier's own greedy continuation of its prefix."""
    roots = loss_mask(example, end_ids)
    targets = distilled_targets(
        verifier, example.input_ids.to(verifier.device), roots.to(verifier.device), depths, tuple(end_ids)
    )
    return RootExample(example.input_ids, roots.nonzero()[:, 0], targets.cpu())


def frequent_tokens(examples: Sequence[RootExample], size: int, vocab_size: int, always: Sequence[int]) -> Tensor:
    """The ``size`` most frequent target tokens (D,), ascending; ``always`` (the end tokens) are in it."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in examples:
        counts += torch.bincount(example.targets[example.targets != IGNORED], minlength=vocab_size)
    counts[list(always)] = counts.sum() + 1
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(examples: Sequence[RootExample], draft_ids: Tensor) -> float:
    """The share of target tokens that the draft vocabulary holds."""
    inside = sum(int(torch.isin(example.targets, draft_ids).sum()) for example in examples)
    return inside / max(sum(int((example.targets != IGNORED).sum()) for example in examples), 1)


def collate(examples: Sequence[RootExample]) -> dict[str, Tensor]:
    """Right-padded texts (B, S), and all their roots in one list: rows (P,), positions (P,), targets (P, K)."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = example.input_ids
        attention_mask[row, : len(example.input_ids)] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "rows": torch.cat([torch.full_like(example.positions, row) for row, example in enumerate(examples)]),
        "positions": torch.cat([example.positions for example in examples]),
        "targets": torch.cat([example.targets for example in examples]),
    }


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


class TimeBudget(TrainerCallback, ExportableState):
    """Train for some seconds, with the learning rate falling to zero at their end (a cosine of the time spent).

    A resumed training goes on with what its checkpoint says was left.

    Args:
        seconds: from the first step on.
        learning_rate: at the start.
        evaluations: how many, evenly spread; their time counts.
    """

    def __init__(self, seconds: float, learning_rate: float, evaluations: int) -> None:
        self.seconds, self.learning_rate, self.evaluations = seconds, learning_rate, evaluations
        self._begun: float | None = None
        self._evaluated = 0

    @property
    def spent(self) -> float:
        """Seconds of training so far."""
        return 0.0 if self._begun is None else time.monotonic() - self._begun

    @property
    def share(self) -> float:
        """The part of the time that is spent, at most 1."""
        return min(self.spent / max(self.seconds, 1e-9), 1.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {name: getattr(self, name) for name in ("seconds", "learning_rate", "evaluations")},
            "attributes": {"spent": self.spent, "evaluated": self._evaluated},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, or set it to where the checkpoint's stood."""
        kept = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.seconds = kept["args"]["seconds"]
        self._begun = time.monotonic() - kept["attributes"]["spent"]
        self._evaluated = kept["attributes"]["evaluated"]

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Set this step's learning rate: ten steps of warm-up, then the cosine."""
        warm = min(1.0, (state.global_step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.share))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop when the time is spent; evaluate when the next share of it has passed, without catching up."""
        due = int(self.share * (self.evaluations + 1))
        if self.share >= 1:
            control.should_training_stop = True
        elif due > self._evaluated:
            self._evaluated, control.should_evaluate = due, True
