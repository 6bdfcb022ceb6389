"""Every option of a training in one object: ours, and transformers' own."""

from dataclasses import dataclass, field

import transformers
from transformers.integrations import is_deepspeed_available

from recurrent_drafter.training.options import BEST, TrainingOptions, option


@dataclass
class TrainingArguments(TrainingOptions, transformers.TrainingArguments):
    """Every option of a training: transformers' own, and the drafter's.

    ``TrainingArguments(output_dir="./models/mine", drafter_predict_n_tokens=4, use_wandb=True)``. Options that depend
    on others (``None`` until then) are settled here. Raises ValueError, naming the flag, for a value that cannot be and
    for options that contradict each other.
    """

    per_device_train_batch_size: int = option(4, "examples per device and step")
    learning_rate: float = option(5e-4, "at the start")
    train_sampling_strategy: str = option("group_by_length", "or random, or sequential")
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "no, steps or epoch; default as often as checkpoints are saved"}
    )
    load_best_model_at_end: bool | None = option(  # type: ignore[assignment]
        None, f"end with the checkpoint of the highest {BEST}; default yes, when each is evaluated"
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "wandb, tensorboard, ... (as many as wanted), all or none"}
    )

    def __post_init__(self) -> None:
        self.settle()
        self._settle_evaluations()
        self.check()
        if self.streaming and self.max_steps <= 0 and self.phase == "train":
            raise ValueError("--streaming needs --max_steps: how long a stream is, is not known")
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("--deepspeed needs DeepSpeed, which is not installed here (pip install deepspeed)")
        if self.output_dir is None:
            self.output_dir = self.default_output_dir
        if self.use_wandb and "wandb" not in self.report_to:
            self.report_to = [*(service for service in self.report_to if service != "none"), "wandb"]
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
