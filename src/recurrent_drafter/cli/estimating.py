"""``train --estimate``: whether a drafter can pay on this machine, and what training one costs. Trains nothing."""

import dataclasses
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback

from recurrent_drafter.cli.fit import measure, new_drafter, new_trainer
from recurrent_drafter.data.encoding import encode_examples
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.measure.estimate import break_even, ceiling, expected_tokens, training_bytes
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import Pair, TrainingText, held_out_replies
from recurrent_drafter.training.distillation import all_with_distilled_targets
from recurrent_drafter.training.targets import Targets, draft_vocabulary, global_batch, with_text

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLE, DISTILLED, STEPS = 256, 8, 5  # conversations that are encoded and distilled, steps that are timed
ATTAINABLE = 0.8  # acceptance per draft token that a good drafter can be hoped to have
GIB = 2**30


def estimate(pair: Pair, text: TrainingText, args: TrainingArguments) -> int:
    """Print break-even, ceilings and training cost, with a drafter of the asked architecture and random weights."""
    dialogues = list(text.dialogues) if not args.streaming else None
    few = [dialogue for _, dialogue in zip(range(SAMPLE), dialogues or text.dialogues, strict=False)]
    examples, _ = encode_examples(
        few, pair.tokenizer, max_length=args.model_max_length, assistant_only=args.train_on_assistant_only
    )
    rows = with_text(pair, examples, args)
    held_out = held_out_replies(pair, args)
    drafter = new_drafter(pair, draft_vocabulary(pair, rows, held_out, args), args)
    costs = measure(drafter, pair)
    report_gain(costs, args)
    drafter = new_drafter(pair, drafter.draft_ids.cpu(), args)
    with tempfile.TemporaryDirectory() as nowhere:
        brief = dataclasses.replace(
            args, output_dir=nowhere, max_steps=STEPS, num_train_epochs=1, report_to=["none"], eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False, early_stopping_patience=None, streaming=False,
            shuffle_buffer=1000, resume_from_checkpoint=None,
        )  # fmt: skip
        timed = StepTimes()
        new_trainer(drafter, pair, Targets(rows, rows), held_out, brief, [timed]).train()
    scale = len(dialogues) / len(few) if dialogues is not None else None
    report_cost(timed.median, None if scale is None else len(examples) * scale, args)
    if args.use_distilled_dataset:
        some = examples[:DISTILLED]
        began = time.perf_counter()
        all_with_distilled_targets(pair.verifier, some, args.distill_num_future_tokens, pair.end_ids)
        each = (time.perf_counter() - began) / len(some)
        texts = min(args.distill_max_examples, round(len(examples) * (scale or 1)))
        print(f"distilling {texts:,} conversations before that: {duration(each * texts)}")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    least = training_bytes(drafter, pair.verifier) / GIB
    print(
        f"memory: {peak / GIB:.2f} GiB at the peak of {STEPS} steps, of which {least:.2f} are "
        "the verifier's weights and the drafter's with gradients and optimiser; nothing was trained"
    )
    return 0


def report_gain(costs: Costs, args: TrainingArguments) -> None:
    """Print the times, the break-even of every draft length, and the ceiling at several acceptances."""
    plain = costs.verify[0]
    relative = ", ".join(f"{n}: {t / plain:.2f}" for n, t in zip(costs.rows, costs.verify, strict=True))
    print(f"a plain step takes {plain * 1e3:.1f} ms; verifying n tokens, in plain steps: {relative}; "
          f"drafting, per token: {costs.draft_level / plain:.2f}")  # fmt: skip
    lengths = range(1, args.depths + 1)
    print("break-even tokens per step, by draft length: "
          + ", ".join(f"{n}: {break_even(costs, DraftShape(1, n)):.2f}" for n in lengths))  # fmt: skip
    print("ceiling of the speed-up, by how often a draft token is accepted:")
    for rate in RATES:
        gain, levels = ceiling(costs, rate, args.depths)
        how = f"{levels} drafted, {expected_tokens(rate, levels):.2f} tokens per step" if levels else "plain decoding"
        print(f"  {rate:.0%}: {gain:.2f}x ({how})")
    hoped, perfect = ceiling(costs, ATTAINABLE, args.depths)[0], ceiling(costs, 1.0, args.depths)[0]
    if perfect <= 1:
        print("warning: it cannot pay here, not even if every draft token were accepted")
    elif hoped < 1.1:
        print(f"warning: at {ATTAINABLE:.0%} accepted, which a good drafter reaches, it gains less than a tenth here")


def report_cost(seconds: float, examples: float | None, args: TrainingArguments) -> None:
    """Print the time of training, from that of a step."""
    steps: float = args.max_steps
    if steps <= 0 and examples is not None:
        steps = args.num_train_epochs * max(examples / global_batch(args), 1)
    print(f"training: {steps:,.0f} steps of {seconds:.2f} s: {duration(steps * seconds)}, evaluations not counted")


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class StepTimes(TrainerCallback):
    """Seconds per step, the first (a warm-up) left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock."""
        self.times.append(time.perf_counter())

    @property
    def median(self) -> float:
        """Of the steps behind the first."""
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))
