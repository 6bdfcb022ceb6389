"""``recurrent-drafter bench`` and ``demo``: what speculation is worth, on one's own model or on the bundled one."""

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import bugs, memory_line, run_records
from recurrent_drafter.bench.engine import inside
from recurrent_drafter.bench.scores import join, read_evaluation
from recurrent_drafter.cli.figures import compared, named, profile_table, show
from recurrent_drafter.cli.inputs import open_speculator
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options.measuring import BenchOptions, DemoOptions
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import HF, LOOKUP_TOKENS, PLAIN, Decoding
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import peak_bytes, provenance, write_records


def run(options: BenchOptions, *, argv: list[str]) -> int:
    if options.join is not None:
        show(Console(), join([(file, read_evaluation(Path(file))) for file in options.join]))
        return 0
    fixed = DraftShape(options.beam_width, options.beam_length)
    model, tokenizer = load_verifier(options.base_model, dtype=options.dtype, device=options.device)
    speculator = open_speculator(options.drafter(), model, tokenizer)
    dataset = options.dataset_name or (None if options.dataset_path else "demo")
    dialogues = load_dialogues(dataset, options.dataset_path, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=options.max_prompt_length)
    batches = ways.batches_of(prompts, options.batch_size, model.device)
    end_ids = as_tuple(model.generation_config.eos_token_id) if options.reply else ()
    decoding = Decoding(options.new_tokens, end_ids, ways.at_temperature(options.temperature), options.seed)
    lookup = ways.lookup_fits(speculator.verifier, batches, options.new_tokens)
    assistant = None
    if options.assistant_model is not None and options.batch_size == 1:
        dtype, device = named(model.dtype), str(model.device)  # the verifier's
        assistant, _ = load_verifier(options.assistant_model, dtype=dtype, device=device)
    arms = ways.standard_arms(speculator, decoding, [fixed], lookup=lookup, assistant=assistant)
    console = Console()
    trials = compared(arms, batches, speculator.verifier, decoding, console)
    if options.batch_size > 1:
        console.print("HF prompt lookup and assisted generation take one prompt at a time: left out.")
    elif not lookup:
        console.print(f"HF prompt lookup needs room for {LOOKUP_TOKENS} tokens more in the context: left out.")
    if options.profile:
        for arm, (profile, memory) in inside(speculator, batches[:5], decoding, fixed).items():
            console.print(profile_table(profile, arm))
            console.print(f"{arm}: {memory_line(memory)}")
    if options.output_file is not None:
        header = {"kind": "circumstances", **provenance(argv), "options": asdict(options)}
        write_records(Path(options.output_file), [header, *run_records(trials)])
        console.print(f"every run: {options.output_file}")
    return 1 if any(list(bugs(trials, arm.name)) for arm in arms) else 0


def demo(options: DemoOptions, *, argv: list[str]) -> int:
    trained = options.speculator_path
    if trained is None and not options.skip_training:
        code = launch("train", ["--quick"])
        if code:
            return code
        trained = "./models/demo-recurrent-drafter"
    model, tokenizer = load_verifier("demo", dtype=options.dtype)
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=512)
    bundled = open_speculator(str(demo_drafter_path()), model, tokenizer)
    ours = {PLAIN: bundled.without_drafter(), "bundled drafter": bundled}
    if trained is not None:
        ours["your drafter"] = open_speculator(trained, model, tokenizer)
    differing, console, batches = 0, Console(), ways.batches_of(prompts, 1, model.device)
    for end_ids in ((), as_tuple(model.generation_config.eos_token_id)):
        decoding = Decoding(options.new_tokens, end_ids)
        arms = [ways.our_arm(name, one, decoding) for name, one in ours.items()]
        trials = compared([ways.hf_arm(HF, model, decoding), *arms], batches, bundled.verifier, decoding, console)
        for arm in trials[0].runs:
            for bug in bugs(trials, arm):
                console.print(f"DIFFERS: {arm}, {bug}")
                differing += 1
    threads, peak = torch.get_num_threads(), peak_bytes() / 2**20
    console.print(f"{len(prompts)} held-out prompts, {threads} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0
