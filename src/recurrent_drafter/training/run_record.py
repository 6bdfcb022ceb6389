"""``run.json`` beside every checkpoint."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recurrent_drafter.records.provenance import RUN_RECORD, write_run


class RunRecord(TrainerCallback):
    """``run.json`` in every checkpoint; tags of ours beside the user's own where the tracker has tags.

    Project, entity, tags and notes are the environment's (``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_TAGS``,
    ``WANDB_NOTES``), as are artifacts and gradients (``WANDB_LOG_MODEL``, ``WANDB_WATCH``): W&B and transformers read
    them. Options and architecture are logged as the trainer's arguments and the model's config.

    Args:
        argv: the command. tags: ours.
        so_far: asked whenever something is written, for what changes meanwhile.
        facts: what else there is to say.
    """

    def __init__(
        self, argv: Sequence[str], tags: Sequence[str], so_far: Callable[[], dict[str, Any]] = dict, **facts: Any
    ) -> None:
        self.argv, self.tags, self.so_far, self.facts = argv, tags, so_far, facts

    def write(self, directory: Path, name: str = RUN_RECORD, **more: Any) -> None:
        """Write it beside something else that is saved."""
        write_run(directory, name, argv=self.argv, **self.facts, **self.so_far(), **more)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add to what the tracker's own callback, which came first, has begun."""
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None and state.is_world_process_zero:
            run.tags = tuple(dict.fromkeys((*(run.tags or ()), *self.tags)))
            run.config.update(
                {name: fact for name, fact in {**self.facts, **self.so_far()}.items() if name != "options"},
                allow_val_change=True,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            self.write(directory, step=state.global_step, best=state.best_metric)
