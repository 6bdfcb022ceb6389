"""Every option of a training in one object."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers.integrations import is_deepspeed_available

from recurrent_drafter.training.options import (
    BEST,
    LEAST,
    NEEDS,
    QUICK_DEPTHS,
    QUICK_DRAFT_VOCABULARY,
    DataOptions,
    DrafterOptions,
    Method,
    MethodOptions,
    RunOptions,
    _option,
)


@dataclass
class TrainingArguments(RunOptions, DataOptions, DrafterOptions, MethodOptions, transformers.TrainingArguments):
    """Every option of a training: transformers' own, and the drafter's.

    ``TrainingArguments(output_dir="./models/mine", drafter_predict_n_tokens=4, use_wandb=True)``. Options that depend
    on others (``None`` until then) are settled here. Raises ValueError, naming the flag, for a value that cannot be and
    for options that contradict each other.
    """

    per_device_train_batch_size: int = _option(4, "examples per device and step")
    learning_rate: float = _option(5e-4, "at the start")
    train_sampling_strategy: str = _option("group_by_length", "or random, or sequential")
    eval_strategy: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "no, steps or epoch; default as often as checkpoints are saved"}
    )
    load_best_model_at_end: bool | None = _option(  # type: ignore[assignment]
        None, f"end with the checkpoint of the highest {BEST}; default yes, when each is evaluated"
    )
    early_stopping_patience: int | None = _option(None, f"stop after so many evaluations without a higher {BEST}")
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "wandb, tensorboard, ... (as many as wanted), all or none"}
    )
    use_wandb: bool = _option(False, "short for --report_to wandb")

    def __post_init__(self) -> None:
        self._settle()
        self._check()
        if self.use_wandb and "wandb" not in self.report_to:
            self.report_to = [*(service for service in self.report_to if service != "none"), "wandb"]
        super().__post_init__()  # type: ignore[no-untyped-call]

    def _settle(self) -> None:
        """Give every option that depends on others its value; settled ones stay."""
        self.llm_name_or_path = self.llm_name_or_path or ("demo" if self.quick else "gpt2")
        if self.dataset_name is None and self.dataset_path is None:
            self.dataset_name = "demo" if self.quick or self.llm_name_or_path == "demo" else "sharegpt"
        if self.drafter_predict_n_tokens is None:
            distilled = self.distill_num_future_tokens if self.use_distilled_dataset else 4
            self.drafter_predict_n_tokens = QUICK_DEPTHS if self.quick else distilled
        self.draft_vocab_size = str(self.draft_vocab_size or (QUICK_DRAFT_VOCABULARY if self.quick else "auto"))
        if self.output_dir is None:
            name = Path(self.llm_name_or_path).name
            self.output_dir = f"./models/{name}-recurrent-drafter" + ("" if name == "demo" else "-trained")
        if self.eval_strategy is None:
            steps = str(getattr(self.save_strategy, "value", self.save_strategy))
            self.eval_strategy = steps if steps in ("steps", "epoch") and not self.quick else "no"
            self.eval_steps = self.eval_steps or (self.save_steps if steps == "steps" else None)
        evaluated = getattr(self.eval_strategy, "value", self.eval_strategy)
        if self.early_stopping_patience is not None and evaluated == "no":
            raise ValueError("--early_stopping_patience needs evaluations: give --eval_strategy steps or epoch")
        if self.load_best_model_at_end is None:
            together = evaluated == getattr(self.save_strategy, "value", self.save_strategy) != "no"
            self.load_best_model_at_end = together and (evaluated == "epoch" or self.eval_steps == self.save_steps)
        if (self.load_best_model_at_end or self.early_stopping_patience) and self.metric_for_best_model is None:
            self.metric_for_best_model = BEST

    def _check(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}, expected at least {least}")
        if self.exit_dim_multiplier <= 0:
            raise ValueError(f"--exit_dim_multiplier is {self.exit_dim_multiplier}, expected more than 0")
        if self.kd_temperature <= 0:
            raise ValueError(f"--kd_temperature is {self.kd_temperature}, expected more than 0")
        if not 0 <= self.kd_alpha <= 1:
            raise ValueError(f"--kd_alpha is {self.kd_alpha}, expected 0 to 1")
        if self.deepspeed and not is_deepspeed_available():
            raise ValueError("--deepspeed needs DeepSpeed, which is not installed here (pip install deepspeed)")
        size = str(self.draft_vocab_size)
        if size not in ("auto", "all") and not (size.isdecimal() and int(size) >= 1):
            raise ValueError(f"--draft_vocab_size is {size}, expected a number of at least 1, 'auto' or 'all'")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        refuse_idle(self, [name for name in NEEDS if getattr(self, name) != defaults[name]])
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        for first, second in (
            ("dataset_name", "dataset_path"),
            ("eval_dataset_name", "eval_dataset_path"),
            ("use_distilled_dataset", "use_knowledge_distillation"),
            ("quick", "use_knowledge_distillation"),
            ("streaming", "quick"),
        ):
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"--{first} and --{second} exclude each other: give one")
        if self.streaming and self.use_distilled_dataset:
            raise ValueError("--streaming keeps no distilled targets: leave it out, their store is on disk already")
        if self.streaming and self.max_steps <= 0 and self.phase == "train":
            raise ValueError("--streaming needs --max_steps: how long a stream is, is not known")
        if self.phase == "eval" and self.drafter_name_or_path is None:
            raise ValueError("--phase eval needs the drafter to evaluate: give --drafter_name_or_path")
        depths = self.drafter_predict_n_tokens or 0
        if self.use_distilled_dataset and not self.quick and depths > self.distill_num_future_tokens:
            raise ValueError(
                f"--drafter_predict_n_tokens {depths} exceeds --distill_num_future_tokens "
                f"{self.distill_num_future_tokens}: distil at least as many tokens as are predicted"
            )

    @property
    def method(self) -> Method:
        """How targets are made."""
        if self.use_knowledge_distillation:
            return "knowledge_distillation"
        return "distilled" if self.use_distilled_dataset or self.quick else "ground_truth"

    @property
    def depths(self) -> int:
        """K, settled."""
        assert self.drafter_predict_n_tokens is not None
        return self.drafter_predict_n_tokens


def refuse_idle(options: TrainingArguments, given: Collection[str]) -> None:
    """Raise ValueError for an option that was given without the one it belongs to."""
    for name in given:
        needed = NEEDS.get(name)
        if needed == "phase" and options.phase != "eval":
            raise ValueError(f"--{name} is for --phase eval: leave it out, training begins with a new drafter")
        if needed not in (None, "phase") and not getattr(options, str(needed)):
            raise ValueError(f"--{name} does nothing without --{needed}: give both or neither")
