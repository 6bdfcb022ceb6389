"""``recurrent-drafter verify``: does speculation change a token? On one's own model, drafter and prompts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.cli.checks import SAMPLED
from recurrent_drafter.cli.generate import autoregression, load_speculator
from recurrent_drafter.cli.options.decoding import SamplingOptions, SpeculatorOptions
from recurrent_drafter.cli.options.measuring import PromptOptions, VerifyOptions
from recurrent_drafter.cli.prompts import load_prompts
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.divergence import (
    NOTHING,
    VERIFICATION_FILE,
    Comparison,
    Draw,
    GenerateBatch,
    Replies,
    compare_batch,
    processors_of,
    until_end,
)
from recurrent_drafter.measure.replies import left_padded
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.hashes import saved_fingerprint
from recurrent_drafter.records.provenance import provenance, write_json

NEVER = -1  # an end token that no vocabulary has: generation goes on
HF, ALONE, DRAFTED, AUTO = "HF generate", "autoregression", "speculation", "auto"
REFERENCES = (HF, ALONE)


@dataclass
class Pass:
    """All prompts decoded in one way of drawing tokens: the settings, what was found, steps and tokens by arm."""

    name: str
    arguments: dict[str, Any]
    arms: list[str]
    end_ids: tuple[int, ...]
    seed: int | None
    comparisons: list[Comparison] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def tokens_per_step(self, arm: str) -> float:
        """NaN for an arm that does not count steps."""
        return self.tokens[arm] / self.steps[arm] if self.steps[arm] else float("nan")


def run(
    which: SpeculatorOptions,
    sampling: SamplingOptions,
    asked: PromptOptions,
    options: VerifyOptions,
    *,
    argv: Sequence[str],
) -> int:
    """Decode prompts with and without speculation and explain every difference: 0 if none is a bug, else 1."""
    draws = sampling.arguments(SAMPLED)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = load_speculator(which, model, tokenizer)
    folder = local_folder(which.speculator_path)
    of = None if folder is None else saved_fingerprint(folder)
    prompts = load_prompts(asked, Verifier(model), tokenizer, count=50)
    passes = make_passes(model, asked, draws, 0 if sampling.seed is None else sampling.seed, auto=options.auto)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        for run in passes:
            task = progress.add_task(f"{run.name}: {len(prompts)} prompts, {len(run.arms)} ways", total=len(prompts))
            for start in range(0, len(prompts), options.batch_size):
                row_ids = list(range(start, min(start + options.batch_size, len(prompts))))
                verify_batch(run, speculator, [prompts[row] for row in row_ids], row_ids)
                progress.advance(task, len(row_ids))
    report(console, passes, tokenizer, asked, options, model)
    bugs = sum(found.kind == "BUG" for run in passes for found in run.comparisons)
    record = as_record(passes, argv, model)
    record |= {"base_model": which.base_model, "prompts": len(prompts), "sustained": asked.sustained, "bugs": bugs}
    if folder is not None:
        keep(console, folder, {**record, "drafter": of})
    if options.output_file is not None:
        write_json(Path(options.output_file), {**record, "rows": as_rows(passes, tokenizer)})
        console.print(f"every comparison: {options.output_file}")
    return 1 if bugs else 0


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


def make_passes(
    model: PreTrainedModel, asked: PromptOptions, draws: dict[str, Any], seed: int, *, auto: bool
) -> list[Pass]:
    """Greedy, with transformers' own loop as the first reference, then sampled if sampling is asked for."""
    settings: Any = model.generation_config
    end_ids = () if asked.sustained else as_tuple(settings.eos_token_id)
    pad = settings.pad_token_id if settings.pad_token_id is not None else 0
    common = {"max_new_tokens": asked.new_tokens, "eos_token_id": list(end_ids) or [NEVER], "pad_token_id": pad}
    ours = [ALONE, DRAFTED, *([AUTO] if auto else [])]
    penalty = {name: value for name, value in draws.items() if name == "repetition_penalty"}
    passes = [Pass("greedy", {**common, "do_sample": False, **penalty}, [HF, *ours], end_ids, None)]
    if draws["do_sample"]:
        passes.append(Pass("sampled", {**common, **draws}, ours, end_ids, seed))
    return passes


def verify_batch(
    run: Pass, speculator: RecurrentDraftingSpeculator, prompts: Sequence[Tensor], row_ids: list[int]
) -> None:
    """Decode prompts (S,) in all ways of a pass, and add what is found to it."""
    verifier = speculator.verifier
    input_ids, mask = left_padded(prompts, verifier.device)
    processors = processors_of(verifier, input_ids, mask, run.arguments)

    def draw(row: int) -> Draw:
        return Draw(input_ids[row], processors, run.seed, row_ids[row])

    arms = {name: make_arm(name, run, speculator) for name in run.arms}
    run.comparisons += compare_batch(verifier, arms, REFERENCES, (input_ids, mask), row_ids, draw)


def make_arm(name: str, run: Pass, speculator: RecurrentDraftingSpeculator) -> GenerateBatch:
    """One way of decoding, by its name."""
    model = speculator.verifier.model

    def cut(sequences: Any, prompt_length: int) -> Replies:
        return [until_end(reply, run.end_ids) for reply in sequences[:, prompt_length:].tolist()]

    def hf_generate(input_ids: Tensor, mask: Tensor, row_ids: list[int]) -> Replies:  # noqa: ARG001
        generate: Any = model.generate
        return cut(generate(input_ids=input_ids, attention_mask=mask, **run.arguments), input_ids.shape[1])

    def ours(input_ids: Tensor, mask: Tensor, row_ids: list[int]) -> Replies:
        decoding = autoregression(model) if name == ALONE else speculator
        fixed = speculator.shape
        assert speculator.drafter is not None
        speculator.shape = None if name == AUTO else fixed or speculator.drafter.config.draft_shape
        try:
            sequences = decoding.generate(input_ids, mask, seed=run.seed, row_ids=row_ids, **run.arguments)
        finally:
            speculator.shape = fixed
        run.steps[name] += decoding.stats.steps
        run.tokens[name] += decoding.stats.tokens
        return cut(sequences, input_ids.shape[1])

    return hf_generate if name == HF else ours


def report(
    console: Console,
    passes: Sequence[Pass],
    tokenizer: PreTrainedTokenizerBase,
    asked: PromptOptions,
    options: VerifyOptions,
    model: PreTrainedModel,
) -> None:
    """A line for every pair of ways, then one for every divergence."""
    protocol = f"{'exactly' if asked.sustained else 'up to'} {asked.new_tokens} new tokens"
    dtype = str(model.dtype).removeprefix("torch.")
    shown = Table(title=f"{protocol}, {dtype}, batch {options.batch_size}", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "decoding", "tok/step", "against", "identical", "ties", "BUG"):
        shown.add_column(column, justify="left" if column in ("", "decoding", "against") else "right")
    for run in passes:
        for pair, found in by_pair(run).items():
            kinds = Counter(comparison.kind for comparison in found)
            per_step = run.tokens_per_step(pair[1])
            bugs = f"[bold red]{kinds['BUG']}[/]" if kinds["BUG"] else "0"
            counts = (str(kinds["identical"]), str(kinds["tie"]), bugs)
            shown.add_row(run.name, pair[1], f"{per_step:.2f}", pair[0], *counts)
    console.print(shown)
    for run in passes:
        for comparison in run.comparisons:
            if comparison.divergence is not None:
                console.print(explain(run.name, comparison, tokenizer), markup=False, highlight=False)


def by_pair(run: Pass) -> dict[tuple[str, str], list[Comparison]]:
    """A pass's comparisons by reference and candidate."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in run.comparisons:
        pairs.setdefault((comparison.reference, comparison.candidate), []).append(comparison)
    return pairs


def explain(name: str, comparison: Comparison, tokenizer: PreTrainedTokenizerBase) -> str:
    """A divergence in one line; prompts and tokens are counted from 0."""
    found = comparison.divergence
    assert found is not None
    tokens = [
        "nothing" if token == NOTHING else f"{token} {tokenizer.decode([token])!r}"
        for token in (found.expected, found.found)
    ]
    return (
        f"{name}, prompt {comparison.prompt}, token {found.position}: {comparison.reference} has {tokens[0]}, "
        f"{comparison.candidate} {tokens[1]}: {found.verdict}"
    )


def as_record(passes: Sequence[Pass], argv: Sequence[str], model: PreTrainedModel) -> dict[str, Any]:
    """What was compared and how it came out, for a file."""
    settings = {run.name: {**run.arguments, "seed": run.seed} for run in passes}
    counts = {
        run.name: [
            {
                "reference": reference,
                "candidate": candidate,
                "tokens_per_step": run.tokens_per_step(candidate) if run.steps[candidate] else None,
                **Counter(comparison.kind for comparison in found),
            }
            for (reference, candidate), found in by_pair(run).items()
        ]
        for run in passes
    }
    made = provenance(argv, model.device.type)
    return {**made, "dtype": str(model.dtype), "settings": settings, "counts": counts}


def as_rows(passes: Sequence[Pass], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Every comparison."""
    rows = []
    for run in passes:
        for comparison in run.comparisons:
            row: dict[str, Any] = {
                "pass": run.name,
                "prompt": comparison.prompt,
                "reference": comparison.reference,
                "candidate": comparison.candidate,
                "verdict": comparison.kind,
            }
            if (found := comparison.divergence) is not None:
                row |= {"position": found.position, "margin": found.margin, "tolerance": found.tolerance}
                for side, token in (("expected", found.expected), ("found", found.found)):
                    text = None if token == NOTHING else tokenizer.decode([token])
                    row[side] = {"id": None if token == NOTHING else token, "text": text}
            rows.append(row)
    return rows
