"""``recurrent-drafter demo`` (``make demo``): train a drafter for the bundled model, then see what it is worth."""

import torch
from rich.console import Console
from transformers import PreTrainedModel

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import bugs
from recurrent_drafter.cli.figures import compared
from recurrent_drafter.cli.inputs import open_speculator
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options.measuring import DemoOptions
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import HF, PLAIN, Decoding, batches_of, hf_arm, our_arm
from recurrent_drafter.measure.ruler import Arm
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import peak_bytes


def run(options: DemoOptions, *, argv: list[str]) -> int:
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
    differing, console = 0, Console()
    for end_ids in ((), as_tuple(model.generation_config.eos_token_id)):
        decoding = Decoding(options.new_tokens, end_ids)
        arms, batches = make_arms(model, drafters, decoding), batches_of(prompts, 1, model.device)
        trials = compared(arms, batches, Verifier(model), decoding, console)
        for arm in arms:
            for bug in bugs(trials, arm.name):
                console.print(f"DIFFERS: {arm.name}, {bug}")
                differing += 1
    threads, peak = torch.get_num_threads(), peak_bytes() / 2**20
    console.print(f"{len(prompts)} held-out prompts, {threads} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0


def make_arms(
    model: PreTrainedModel, drafters: dict[str, RecurrentDraftingSpeculator], decoding: Decoding
) -> list[Arm]:
    """HF generate first: it is the reference for equality."""
    ours = {PLAIN: next(iter(drafters.values())).without_drafter(), **drafters}
    return [hf_arm(HF, model, decoding), *(our_arm(name, way, decoding) for name, way in ours.items())]
