"""``recurrent-drafter demo`` (``make demo``): train a drafter for the bundled model, then see what it is worth."""

import resource
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.cli.figures import arm_table
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options.measuring import DemoOptions
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import HF, PLAIN, hf_arm, our_arm
from recurrent_drafter.measure.comparison import Arm, Decoding, batches_of, compare
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier


def run(options: DemoOptions, *, argv: Sequence[str]) -> int:
    """Train a drafter for the bundled model in four minutes, then compare it with plain generation."""
    trained = options.speculator_path
    if trained is None and not options.skip_training:
        code = launch("train", ["--quick"])
        if code:
            return code
        trained = "./models/demo-recurrent-drafter"
    model, tokenizer = load_verifier("demo", dtype=options.dtype)
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=512)
    drafters = {"bundled drafter": open_speculator(str(demo_drafter_path()), model, tokenizer)}
    if trained is not None:
        drafters["your drafter"] = open_speculator(trained, model, tokenizer)
    differing = 0
    console = Console()
    for end_ids in ((), as_tuple(model.generation_config.eos_token_id)):
        decoding = Decoding(options.new_tokens, end_ids)
        arms = make_arms(model, drafters, decoding)
        batches = batches_of(prompts, 1, model.device)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{len(prompts)} prompts, {len(arms)} arms", total=len(prompts))
            results = compare(arms, batches, Verifier(model), decoding, done=partial(progress.advance, task))
        console.print(arm_table(results, decoding, model, batch_size=1))
        for result in results:
            differing += len(result.bugs)
            for bug in result.bugs:
                console.print(f"DIFFERS: {result.name}, {bug}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"{len(prompts)} held-out prompts, {torch.get_num_threads()} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0


def make_arms(
    model: PreTrainedModel, drafters: dict[str, RecurrentDraftingSpeculator], decoding: Decoding
) -> list[Arm]:
    """HF generate first: it is the reference for equality."""
    alone = RecurrentDraftingSpeculator(None)
    alone.attach_verifier(model)
    return [
        hf_arm(HF, model, decoding),
        our_arm(PLAIN, alone, decoding),
        *(our_arm(name, speculator, decoding) for name, speculator in drafters.items()),
    ]
