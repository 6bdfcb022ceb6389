"""Whether a drafter can pay on this machine, and what training one costs: measured with one that has not learnt."""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import torch

from recurrent_drafter.data.sources import LoadedDialogues
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.measure.estimate import break_even, ceiling, training_bytes
from recurrent_drafter.measure.step_costs import packed_costs
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import peak_bytes
from recurrent_drafter.training.arguments import TrainingArguments, global_batch
from recurrent_drafter.training.callbacks import CallerAnswers, OnProgress
from recurrent_drafter.training.corpus import TrainingText
from recurrent_drafter.training.distillation import with_distilled_targets
from recurrent_drafter.training.targets import Material, draft_vocabulary, encoded, with_text
from recurrent_drafter.training.trainer import new_drafter, new_trainer

MEASURED_CONTEXT = 256  # tokens that timed steps follow
SAMPLE, DISTILLED, STEPS = 256, 8, 5  # conversations that are encoded and distilled, steps that are timed


@dataclass(frozen=True)
class TrainingEstimate:
    """What a drafter of the asked architecture can gain here, and what it costs to train.

    Attributes:
        costs: seconds of a step by tokens verified, and of each drafted token.
        depths: K, the longest draft.
        steps: of the whole training.
        step_seconds: of one of them, evaluations not counted.
        distilled: conversations to distil before that, 0 without distillation.
        distilled_seconds: of all of them.
        peak_bytes: the most memory that a few steps took.
        kept_bytes: what of it are weights, gradients and optimizer.
        lookup: tokens per step that lookup alone yields on the held-out replies, by the nodes of its tree.
    """

    costs: Costs
    depths: int
    steps: float
    step_seconds: float
    distilled: int
    distilled_seconds: float
    peak_bytes: int
    kept_bytes: int
    lookup: dict[int, float]

    @property
    def break_evens(self) -> list[float]:
        """Tokens per step from which on a draft of 1 .. K tokens pays."""
        return [break_even(self.costs, DraftShape(1, length)) for length in range(1, self.depths + 1)]

    def ceiling(self, rate: float) -> tuple[float, int]:
        """The best speed-up where a draft token is accepted at this ``rate``, and the draft's length (0: do not)."""
        return ceiling(self.costs, rate, self.depths)


def estimated(text: TrainingText, material: Material, args: TrainingArguments, tell: OnProgress) -> TrainingEstimate:
    """Measure with a drafter of the asked architecture and random weights, on a sample of the text."""
    pair, verifier = material.pair, material.pair.verifier
    few = list(itertools.islice(text, SAMPLE))
    examples = tuple(encoded(few, pair, args))
    material = replace(material, train=with_text(pair, examples, args))
    draft_ids = draft_vocabulary(material, args, tell)
    drafter = new_drafter(pair, draft_ids, args)
    kept = training_bytes(drafter, verifier)
    costs = measured_costs(drafter, verifier)
    seconds = step_seconds(material, draft_ids, args)
    texts = len(examples) * (len(text.dialogues) / len(few) if isinstance(text, LoadedDialogues) else 1)
    steps = float(args.max_steps)
    if steps <= 0:
        steps = args.num_train_epochs * max(texts / global_batch(args), 1)
    distilled, each = 0, 0.0
    if args.use_distilled_dataset:
        some, begun = examples[:DISTILLED], time.perf_counter()
        with_distilled_targets(verifier, some, args.distill_num_future_tokens, pair.end_ids)
        distilled, each = min(args.distill_max_examples, round(texts)), (time.perf_counter() - begun) / len(some)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
    lookup = {nodes: material.held_out.tokens_per_step_of_lookup(nodes) for nodes in costs.rows if nodes > 1}
    return TrainingEstimate(costs, args.depths, steps, seconds, distilled, distilled * each, peak, kept, lookup)


def measured_costs(drafter: RecurrentDrafter, verifier: Verifier) -> Costs:
    """Times of real steps with this drafter, in the verifier's dtype."""
    width = drafter.config.beam_width
    drafter = drafter.to(device=verifier.device, dtype=verifier.model.dtype).eval()  # type: ignore[arg-type, call-arg]
    context = min(MEASURED_CONTEXT, (verifier.context_length or MEASURED_CONTEXT + 32) - 32)
    return packed_costs(verifier, drafter, context, rows=(1, 2, 4, 8, 12, 16), widths=(width,)).of_width(width)


def step_seconds(material: Material, draft_ids: torch.Tensor, args: TrainingArguments, steps: int = STEPS) -> float:
    """The median step, but the first, of a training that learns nothing."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as nowhere:
        brief = replace(
            args, output_dir=nowhere, max_steps=steps, num_train_epochs=1, learning_rate=0.0,
            lr_scheduler_type="constant", lr_scheduler_kwargs=None, report_to=["none"], eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False, early_stopping_patience=None, streaming=False,
            shuffle_buffer=1000, resume_from_checkpoint=None,
        )  # fmt: skip
        clock = CallerAnswers(lambda _: ends.append(time.perf_counter()))
        new_trainer(new_drafter(material.pair, draft_ids, brief), material, brief, clock).train()
    return statistics.median(end - begun for begun, end in itertools.pairwise(ends[1:]))
