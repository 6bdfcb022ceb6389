"""``recurrent-drafter bench``: what speculation is worth on one's own model, drafter and prompts."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from recurrent_drafter.bench.measure import run_records
from recurrent_drafter.bench.memory import memory_of
from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.bench.summary import memory_line, write_records
from recurrent_drafter.cli.figures import arm_table, profile_table
from recurrent_drafter.cli.options.measuring import BenchOptions
from recurrent_drafter.cli.scores import join_files
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import AUTO, LOOKUP_TOKENS, lookup_fits, shape_name, standard_arms, variant
from recurrent_drafter.measure.comparison import Arm, Batch, Decoding, batches_of, compare
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import provenance


def run(options: BenchOptions, *, argv: Sequence[str]) -> int:
    """Compare ways of decoding on your model and prompts: speed, and whether the output is the same."""
    if options.join is not None:
        return join_files(options.join, Console())
    fixed = DraftShape(options.beam_width, options.beam_length)
    model, tokenizer = load_verifier(options.base_model, dtype=options.dtype, device=options.device)
    speculator = open_speculator(options.drafter, model, tokenizer)
    dataset = options.dataset_name or (None if options.dataset_path else "demo")
    dialogues = load_dialogues(dataset, options.dataset_path, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=options.max_prompt_length)
    batches = batches_of(prompts, options.batch_size, model.device)
    end_ids = as_tuple(model.generation_config.eos_token_id) if options.reply else ()
    decoding = Decoding(options.new_tokens, end_ids, options.temperature, options.seed)
    lookup = lookup_fits(speculator.verifier, batches, options.new_tokens)
    arms = standard_arms(speculator, decoding, [fixed], lookup=lookup, assistant=assistant_for(options, model))
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{len(batches)} batches, {len(arms)} arms", total=len(batches))
        results = compare(arms, batches, speculator.verifier, decoding, done=partial(progress.advance, task))
    console.print(arm_table(results, decoding, model, options.batch_size))
    if options.batch_size > 1:
        console.print("HF prompt lookup and assisted generation take one prompt at a time: left out.")
    elif not lookup:
        console.print(f"HF prompt lookup needs room for {LOOKUP_TOKENS} tokens more in the context: left out.")
    if options.profile:
        show_inside(console, speculator, fixed, arms, batches, options.new_tokens)
    if options.output_file is not None:
        header = {"kind": "circumstances", **provenance(argv), "options": asdict(options)}
        write_records(Path(options.output_file), [header, *(line for r in results for line in run_records(r))])
        console.print(f"every run: {options.output_file}")
    return 1 if any(result.bugs for result in results) else 0


def assistant_for(options: BenchOptions, model: PreTrainedModel) -> PreTrainedModel | None:
    """The smaller model, in the verifier's dtype and on its device."""
    if options.assistant_model is None or options.batch_size > 1:
        return None
    dtype = str(model.dtype).removeprefix("torch.")
    return load_verifier(options.assistant_model, dtype=dtype, device=str(model.device))[0]


def show_inside(
    console: Console,
    speculator: RecurrentDraftingSpeculator,
    fixed: DraftShape,
    arms: Sequence[Arm],
    batches: Sequence[Batch],
    new_tokens: int,
) -> None:
    """Time and memory of a step, at the fixed shape and by ``auto``."""
    for name, shape in ((shape_name(fixed), fixed), (AUTO, None)):
        arm = next(arm for arm in arms if arm.name == name)
        with profiled() as profile:
            for batch in batches[:5]:
                arm.generate(batch, new_tokens)
        console.print(profile_table(profile, name))
        memory = memory_of(variant(speculator, shape), partial(arm.generate, batches[0], new_tokens)).mebibytes()
        console.print(f"{name}: {memory_line(memory)}")
