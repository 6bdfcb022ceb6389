"""``recurrent-drafter verify``, ``tune``, ``bench`` and ``demo``: what speculation changes, and what it is worth."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import bugs, memory_line, run_records
from recurrent_drafter.bench.engine import inside
from recurrent_drafter.bench.scores import join, read_evaluation
from recurrent_drafter.cli.figures import compared, named, profile_table, show
from recurrent_drafter.cli.inputs import open_speculator, pack_weights
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options import measuring as asks
from recurrent_drafter.cli.options.decoding import SamplingOptions, SpeculatorOptions, given
from recurrent_drafter.cli.progress import tracked
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.costs import Tuning, conditions
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import HF, LOOKUP_TOKENS, PLAIN, Decoding
from recurrent_drafter.measure.ruler import BUG, tokens_per_step, verdict, verdicts_on
from recurrent_drafter.measure.tuning import AND_LOOKUP, BatchFindings, Search, label
from recurrent_drafter.measure.verification import Verification, as_record, verifications
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_drafter, load_verifier, save_drafter
from recurrent_drafter.models.packed_linear import arrange
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records import provenance as records
from recurrent_drafter.records.paths import TUNING_FILE
from recurrent_drafter.report.charts import MISSING, can_draw, draw_speed_maps
from recurrent_drafter.report.document import Columns, terminal


def verify(
    which: SpeculatorOptions,
    sampling: SamplingOptions,
    asked: asks.PromptOptions,
    options: asks.VerifyOptions,
    *,
    argv: list[str],
) -> int:
    """Decode prompts with and without speculation and explain every difference: 0 if none is a bug, else 1."""
    draws = sampling.arguments(asks.SAMPLED)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    # Transformers comes first, on the weights as they are.
    speculator = open_speculator(which.drafter, model, tokenizer, which.shape, lookup=which.lookup, packed=False)
    folder = local_folder(which.speculator_path)
    of = None if folder is None else records.saved_fingerprint(folder)
    prompts = load_prompts(asked, speculator.verifier, tokenizer, count=50)
    greedy = decoding_of(asked, model, {"do_sample": False, **given(sampling, "repetition_penalty")})
    sampled = decoding_of(asked, model, draws, sampling.seed or 0) if draws["do_sample"] else None
    passes = verifications(speculator, greedy, sampled, auto=options.auto)
    console, batches = Console(), ways.batches_of(prompts, options.batch_size, model.device, whole=False)
    for way in passes:
        done = way.verify(speculator.verifier, batches, partial(pack_weights, model))
        said = f"{way.name}, {len(way.arms)} ways"
        for _ in tracked(done, said, "prompts", total=len(prompts), counted=lambda batch: len(batch.row_ids)):
            pass
    console.print(verified(passes, f"{greedy.protocol}, {named(model.dtype)}, batch {options.batch_size}"))
    for way in passes:
        for found in way.differing:
            console.print(f"{way.name}, {found.explained(tokenizer)}", markup=False, highlight=False)
    made = {**records.provenance(argv, model.device.type), "dtype": str(model.dtype), **as_record(passes)}
    made |= {"base_model": which.base_model, "prompts": len(prompts), "sustained": asked.sustained}
    made |= {"lookup": speculator.lookup}
    if folder is not None:
        keep(console, folder, {**made, "drafter": of})
    if options.output_file is not None:
        rows = [{"pass": way.name, **found.as_row(tokenizer)} for way in passes for found in way.comparisons]
        records.write_json(Path(options.output_file), {**made, "rows": rows})
        console.print(f"every comparison: {options.output_file}")
    return 1 if made["bugs"] else 0


def load_prompts(
    options: asks.PromptOptions, verifier: Verifier, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Tensor]:
    """``count`` prompts (S,), or as many as the options say, all of which leave room for the reply."""
    longest = 512
    if verifier.context_length is not None:
        longest = min(longest, verifier.context_length - options.new_tokens)
        if longest < 1:
            raise ValueError(
                f"--new_tokens is {options.new_tokens}, expected less than the context of {verifier.context_length}"
            )
    name = None if options.dataset_path else options.dataset_name or "demo"
    dialogues = load_dialogues(name, options.dataset_path, "eval" if name else "all").dialogues
    return prompts_from_dialogues(dialogues, tokenizer, count=options.prompts or count, max_length=longest)


def decoding_of(
    asked: asks.PromptOptions, model: PreTrainedModel, sampling: Mapping[str, Any] | None = None, seed: int = 0
) -> Decoding:
    """How replies to these prompts are decoded: through end tokens or up to them."""
    end_ids = () if asked.sustained else as_tuple(model.generation_config.eos_token_id)
    return Decoding(asked.new_tokens, end_ids, sampling or ways.at_temperature(0), seed)


def local_folder(speculator_path: str | None) -> Path | None:
    folder = None if speculator_path is None else Path(speculator_path).expanduser()
    return folder if folder is not None and folder.is_dir() else None


def keep(console: Console, folder: Path, record: dict[str, Any]) -> None:
    """Leave the result beside the drafter: what is published can then show that it was verified."""
    try:
        records.write_json(folder / records.VERIFICATION_FILE, record)
        console.print(f"kept beside the drafter: {folder / records.VERIFICATION_FILE}")
    except OSError as error:  # the result holds all the same
        console.print(
            f"{folder / records.VERIFICATION_FILE} could not be written ({error.strerror}): "
            "the drafter does not count as verified"
        )


def verified(passes: Sequence[Verification], title: str) -> Table:
    rows = [(way, *pair, counts) for way in passes for pair, counts in way.pairs.items()]
    columns: Columns = {
        "": lambda row: row[0].name,
        "decoding": lambda row: row[2],
        "tok/step": lambda row: f"{tokens_per_step(row[0].trials, row[2]):.2f}",
        "against": lambda row: row[1],
        "identical": lambda row: str(row[3]["identical"]),
        "ties": lambda row: str(row[3]["tie"]),
        "BUG": lambda row: f"[bold red]{row[3]['BUG']}[/]" if row[3]["BUG"] else "0",
    }
    return terminal(rows, columns, title, left=("decoding", "against"))


def tune(which: SpeculatorOptions, asked: asks.PromptOptions, options: asks.TuneOptions, *, argv: list[str]) -> int:
    folder = asks.tuning_folder(which, options)
    if not can_draw():
        print(MISSING, file=sys.stderr)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    arrange(model)
    speculator = open_speculator(which.drafter, model, tokenizer, which.shape, lookup=which.lookup)
    assert speculator.drafter is not None
    if max(options.widths) > (most := speculator.drafter.config.draft_vocab_size):
        raise ValueError(f"--widths has {max(options.widths)} in it, expected at most {most} (the draft vocabulary)")
    prompts = load_prompts(asked, speculator.verifier, tokenizer, count=20)
    console, decoding = Console(), decoding_of(asked, model)
    search = Search(
        speculator, prompts, decoding, options.batch_size, options.widths, options.lengths, options.confirm, tracked
    )
    findings, single = search.run()
    for found in findings:
        console.print(tuned(found, f"{decoding.protocol}, greedy, {named(model.dtype)}: speed over autoregression"))
    differing = [(found.batch, comparison) for found in findings for comparison in found.differing]
    for batch, comparison in differing:
        console.print(f"batch {batch}, {comparison.explained(tokenizer)}", markup=False, highlight=False)
    if any(comparison.verdict.outcome == BUG for _, comparison in differing):
        console.print("nothing is saved: speculation changed the output")
        return 1
    if options.copy_drafter:
        save_drafter(load_drafter(which.speculator_path or str(demo_drafter_path())), folder)
    made = {**records.provenance(argv, model.device.type), "asked": dataclasses.asdict(asked)}
    for line in save(folder, findings, Tuning(findings[0].best.shape, single, conditions(model)), made):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def tuned(found: BatchFindings, title: str) -> Table:
    predicted, joined = found.predicted, {arm: f"{one.tokens_per_step:.2f}" for arm, one in found.looked_up.items()}
    columns: Columns = {
        "beams x length": lambda arm: f"[bold]{arm}[/]" if predicted.get(arm) is found.best else broken(arm),
        "walk": lambda arm: f"{predicted[arm].tokens_per_step:.2f}" if arm in predicted else "",
        **({"with\nlookup": lambda arm: joined.get(arm, "")} if joined else {}),
        "tok/\nstep": lambda arm: f"{tokens_per_step(found.trials, arm):.2f}",
        "predicted": lambda arm: f"{predicted[arm].speedup:.2f}" if arm in predicted else "",
        "measured": lambda arm: f"{found.speedup(arm):.2f}",
        "decoding\nonly": lambda arm: f"{found.speedup(arm, decoding_only=True).value:.2f}",
        "identical": lambda arm: verdict(verdicts_on(found.trials, arm)),
    }
    return terminal(found.arms[1:], columns, f"batch {found.batch}, {title}", tight=True)


def broken(arm: str) -> str:
    """In two lines where lookup joins a shape."""
    return arm.replace(AND_LOOKUP, f"\n{AND_LOOKUP}")


def save(folder: Path, findings: Sequence[BatchFindings], tuning: Tuning, made: dict[str, Any]) -> list[str]:
    """Write ``tuning.json`` and the picture; returns what there is to say about it."""
    batches = [found.as_record() for found in findings]
    records.write_json(folder / TUNING_FILE, {**made, **tuning.as_record(), "batches": batches})
    said = [f"{folder / TUNING_FILE}: {label(tuning.shape)} at batch {findings[0].batch}, and the costs measured here"]
    if can_draw():
        grids = {f"batch {found.batch}": {cell: x.speedup for cell, x in found.cells.items()} for found in findings}
        hardware, dtype = (tuning.holds_for[name] for name in ("hardware", "dtype"))
        title = f"{hardware['device']}, threads: {hardware['threads']}, {dtype}"
        draw_speed_maps(folder / "tuning.png", grids, title)
        said.append(f"{folder / 'tuning.png'}: speed over width and length, at the best number of nodes")
    if (folder / "config.json").is_file():
        said.append(f"used from now on, on this machine and in this dtype, by --speculator_path {folder}")
    else:
        said.append(
            f"{folder} holds no drafter: {TUNING_FILE} is used where it lies beside one (--copy_drafter puts it there)"
        )
    return said


def bench(options: asks.BenchOptions, *, argv: list[str]) -> int:
    if options.join is not None:
        show(Console(), join([(file, read_evaluation(Path(file))) for file in options.join]))
        return 0
    fixed = DraftShape(options.beam_width, options.beam_length)
    model, tokenizer = load_verifier(options.base_model, dtype=options.dtype, device=options.device)
    arrange(model)
    speculator = open_speculator(options.drafter, model, tokenizer, lookup=options.lookup)
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
        header = {"kind": "circumstances", **records.provenance(argv), "options": dataclasses.asdict(options)}
        records.write_records(Path(options.output_file), [header, *run_records(trials)])
        console.print(f"every run: {options.output_file}")
    return 1 if any(list(bugs(trials, arm.name)) for arm in arms) else 0


def demo(options: asks.DemoOptions, *, argv: list[str]) -> int:
    trained = options.speculator_path
    if trained is None and not options.skip_training:
        code = launch("train", ["--quick"])
        if code:
            return code
        trained = "./models/demo-recurrent-drafter"
    model, tokenizer = load_verifier("demo", dtype=options.dtype)
    arrange(model)
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=512)
    bundled = open_speculator(str(demo_drafter_path()), model, tokenizer, lookup=options.lookup)
    ours = {PLAIN: bundled.without_drafter(), "bundled drafter": bundled}
    if trained is not None:
        ours["your drafter"] = open_speculator(trained, model, tokenizer, lookup=options.lookup)
    differing, console, batches = 0, Console(), ways.batches_of(prompts, 1, model.device)
    for end_ids in ((), as_tuple(model.generation_config.eos_token_id)):
        decoding = Decoding(options.new_tokens, end_ids)
        arms = [ways.our_arm(name, one, decoding) for name, one in ours.items()]
        trials = compared([ways.hf_arm(HF, model, decoding), *arms], batches, bundled.verifier, decoding, console)
        for arm in trials[0].runs:
            for bug in bugs(trials, arm):
                console.print(f"DIFFERS: {arm}, {bug}")
                differing += 1
    threads, peak = torch.get_num_threads(), records.peak_bytes() / 2**20
    console.print(f"{len(prompts)} held-out prompts, {threads} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0
