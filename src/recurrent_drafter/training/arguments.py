"""Every option of a training in one object: ours, and transformers' own."""

from dataclasses import dataclass

import transformers
from transformers.integrations import is_deepspeed_available

from recurrent_drafter.training.options import BEST, TrainingOptions


@dataclass
class TrainingArguments(TrainingOptions, transformers.TrainingArguments):  # type: ignore[misc]  # narrower types
    """Every option of a training: transformers' own, and the drafter's.

    ``TrainingArguments(output_dir="./models/mine", drafter_predict_n_tokens=4, use_wandb=True)``. Options that depend
    on others (``None`` until then) are settled here. Raises ValueError, naming the flag, for a value that cannot be and
    for options that contradict each other.
    """

    def __post_init__(self) -> None:
        self.settle()
        self._settle_evaluations()
        self.check()
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("--deepspeed needs DeepSpeed, which is not installed here (pip install deepspeed)")
        super().__post_init__()  # type: ignore[no-untyped-call]

    def _settle_evaluations(self) -> None:
        """Evaluate whenever a checkpoint is saved, and end with the best one, unless told otherwise."""
        saved = str(getattr(self.save_strategy, "value", self.save_strategy))
        if self.eval_strategy is None:
            self.eval_strategy = saved if saved in ("steps", "epoch") and not self.quick else "no"
            self.eval_steps = self.eval_steps or (self.save_steps if saved == "steps" else None)
        evaluated = getattr(self.eval_strategy, "value", self.eval_strategy)
        if self.early_stopping_patience is not None and evaluated == "no":
            raise ValueError("--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch")
        if self.load_best_model_at_end is None:
            together = evaluated == saved != "no"
            self.load_best_model_at_end = together and (evaluated == "epoch" or self.eval_steps == self.save_steps)
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.metric_for_best_model is None:
            self.metric_for_best_model = BEST


def global_batch(args: transformers.TrainingArguments) -> int:
    """Examples per step over all processes: the order of training depends on nothing else."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
