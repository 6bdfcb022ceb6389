"""``recurrent-drafter verify``: does speculation change a token? On one's own model, drafter and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recurrent_drafter.cli.figures import named
from recurrent_drafter.cli.inputs import decoding_of, load_prompts, open_speculator
from recurrent_drafter.cli.options.decoding import SamplingOptions, SpeculatorOptions, given
from recurrent_drafter.cli.options.measuring import SAMPLED, PromptOptions, VerifyOptions
from recurrent_drafter.measure.arms import batches_of
from recurrent_drafter.measure.ruler import tokens_per_step
from recurrent_drafter.measure.verification import Verification, as_record, verifications
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import VERIFICATION_FILE, provenance, saved_fingerprint, write_json
from recurrent_drafter.report.tables import Columns, terminal


def run(
    which: SpeculatorOptions,
    sampling: SamplingOptions,
    asked: PromptOptions,
    options: VerifyOptions,
    *,
    argv: list[str],
) -> int:
    """Decode prompts with and without speculation and explain every difference: 0 if none is a bug, else 1."""
    draws = sampling.arguments(SAMPLED)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = open_speculator(which.drafter(), model, tokenizer, which.shape)
    folder = local_folder(which.speculator_path)
    of = None if folder is None else saved_fingerprint(folder)
    prompts = load_prompts(asked, speculator.verifier, tokenizer, count=50)
    greedy = decoding_of(asked, model, {"do_sample": False, **given(sampling, "repetition_penalty")})
    sampled = decoding_of(asked, model, draws, sampling.seed or 0) if draws["do_sample"] else None
    passes = verifications(speculator, greedy, sampled, auto=options.auto)
    console, batches = Console(), batches_of(prompts, options.batch_size, model.device, whole=False)
    with Progress(console=console, transient=True) as progress:
        for way in passes:
            task = progress.add_task(f"{way.name}: {len(prompts)} prompts, {len(way.arms)} ways", total=len(prompts))
            for batch in way.verify(speculator.verifier, batches):
                progress.advance(task, len(batch.row_ids))
    console.print(table(passes, f"{greedy.protocol}, {named(model.dtype)}, batch {options.batch_size}"))
    for way in passes:
        for found in way.differing:
            console.print(f"{way.name}, {found.explained(tokenizer)}", markup=False, highlight=False)
    made = {**provenance(argv, model.device.type), "dtype": str(model.dtype), **as_record(passes)}
    made |= {"base_model": which.base_model, "prompts": len(prompts), "sustained": asked.sustained}
    if folder is not None:
        keep(console, folder, {**made, "drafter": of})
    if options.output_file is not None:
        rows = [{"pass": way.name, **found.as_row(tokenizer)} for way in passes for found in way.comparisons]
        write_json(Path(options.output_file), {**made, "rows": rows})
        console.print(f"every comparison: {options.output_file}")
    return 1 if made["bugs"] else 0


def local_folder(speculator_path: str | None) -> Path | None:
    """The drafter's own folder, if it is a local one."""
    folder = None if speculator_path is None else Path(speculator_path).expanduser()
    return folder if folder is not None and folder.is_dir() else None


def keep(console: Console, folder: Path, record: dict[str, Any]) -> None:
    """Leave the result beside the drafter: what is published can then show that it was verified."""
    try:
        write_json(folder / VERIFICATION_FILE, record)
        console.print(f"kept beside the drafter: {folder / VERIFICATION_FILE}")
    except OSError as error:  # the result holds all the same
        console.print(
            f"{folder / VERIFICATION_FILE} could not be written ({error.strerror}): "
            "the drafter does not count as verified"
        )


def table(passes: Sequence[Verification], title: str) -> Table:
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
