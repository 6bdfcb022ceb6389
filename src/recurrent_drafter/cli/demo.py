"""``recurrent-drafter demo`` (``make demo``): train a drafter for the bundled model, then see what it is worth."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from recurrent_drafter.bench.columns import bugs
from recurrent_drafter.cli import train
from recurrent_drafter.cli.errors import parse, reporting
from recurrent_drafter.cli.figures import arm_table, compared
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import HF, PLAIN, Decoding, batches_of, hf_arm, our_arm, without_drafter
from recurrent_drafter.measure.ruler import Arm
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier


@dataclass(frozen=True)
class DemoOptions:
    """What to show."""

    prompts: int = field(default=30, metadata={"help": "held-out prompts"})
    new_tokens: int = field(default=128, metadata={"help": "tokens per prompt (sustained), at most (reply)"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16"})
    skip_training: bool = field(default=False, metadata={"help": "compare with the bundled drafter only"})
    speculator_path: str | None = field(
        default=None, metadata={"help": "a drafter to compare too, instead of training"}
    )

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.new_tokens < 2:
            raise ValueError("--prompts and --new_tokens are counts: expected at least 1 and 2")


OPTIONS = (DemoOptions,)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter for the bundled model in four minutes, then compare it with plain generation."""
    (options,) = parse(sys.argv[1:] if argv is None else argv, main.__doc__ or "", *OPTIONS)
    trained = options.speculator_path
    if trained is None and not options.skip_training:
        code = train.main(["--quick"])
        if code:
            return code
        trained = "./models/demo-recurrent-drafter"
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model, tokenizer = load_verifier("demo", dtype=options.dtype)
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=512)
    drafters = {"bundled drafter": open_speculator("demo", None, model, tokenizer)}
    if trained is not None:
        drafters["your drafter"] = open_speculator("demo", trained, model, tokenizer)
    differing, console = 0, Console()
    for end_ids in ((), as_tuple(model.generation_config.eos_token_id)):
        decoding = Decoding(options.new_tokens, end_ids)
        arms, batches = make_arms(model, drafters, decoding), batches_of(prompts, 1, model.device)
        trials = compared(arms, batches, Verifier(model), decoding, console)
        console.print(arm_table(trials, decoding, model.dtype, batch_size=1))
        for arm in arms:
            for bug in bugs(trials, arm.name):
                console.print(f"DIFFERS: {arm.name}, {bug}")
                differing += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"{len(prompts)} held-out prompts, {torch.get_num_threads()} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0


def make_arms(
    model: PreTrainedModel, drafters: dict[str, RecurrentDraftingSpeculator], decoding: Decoding
) -> list[Arm]:
    """HF generate first: it is the reference for equality."""
    alone = without_drafter(next(iter(drafters.values())))
    ours = {PLAIN: alone, **drafters}
    return [hf_arm(HF, model, decoding), *(our_arm(name, ours[name], decoding) for name in ours)]
