"""``recurrent-drafter bench``: what speculation is worth on one's own model, drafter and prompts."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from recurrent_drafter.bench.columns import bugs, memory_line, run_records
from recurrent_drafter.bench.engine import inside
from recurrent_drafter.cli.errors import parse, reporting
from recurrent_drafter.cli.figures import arm_table, compared, profile_table
from recurrent_drafter.cli.scores import join_files
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure.arms import (
    LOOKUP_TOKENS,
    Decoding,
    at_temperature,
    batches_of,
    lookup_fits,
    standard_arms,
)
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.lines import write_records
from recurrent_drafter.records.provenance import provenance


@dataclass(frozen=True)
class BenchOptions:
    """What to compare, and on what."""

    base_model: str = field(
        default="demo", metadata={"help": "verifier: a hub name, a directory, or 'demo' (the bundled model)"}
    )
    speculator_path: str | None = field(
        default=None, metadata={"help": "a trained drafter; for 'demo' the bundled one is used without it"}
    )
    assistant_model: str | None = field(
        default=None, metadata={"help": "a smaller model of the same vocabulary, for HF assisted generation"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "prompts from it (default: 'demo', held out)"})
    dataset_path: str | None = field(default=None, metadata={"help": "prompts from a local file instead"})
    prompts: int = field(default=20, metadata={"help": "how many; rounded down to full batches"})
    max_prompt_length: int = field(default=512, metadata={"help": "tokens of a prompt at most"})
    new_tokens: int = field(default=128, metadata={"help": "tokens per reply: exactly, or at most with --reply"})
    reply: bool = field(default=False, metadata={"help": "stop at the model's end token"})
    batch_size: int = field(default=1, metadata={"help": "prompts generated from together"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    beam_width: int = field(default=10, metadata={"help": "of the arm with a fixed shape"})
    beam_length: int = field(default=4, metadata={"help": "of the arm with a fixed shape"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 where the hardware computes in it, otherwise float32"}
    )
    device: str | None = field(default=None, metadata={"help": "default: cuda where there is one, otherwise cpu"})
    profile: bool = field(default=False, metadata={"help": "also show where a step's time and memory go"})
    output_file: str | None = field(default=None, metadata={"help": "every run as a JSON line"})
    join: list[str] | None = field(
        default=None,
        metadata={"help": "nothing is run: the arms of several generate_speculator.py --output_file side by side"},
    )

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ValueError(f"--new_tokens is {self.new_tokens}, expected at least 2")
        if not 1 <= self.batch_size <= self.prompts:
            raise ValueError(f"--batch_size is {self.batch_size}, expected 1 to --prompts, {self.prompts}")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.join is not None and len(self.join) < 2:
            raise ValueError(f"--join {self.join[0]}: expected two files, one of them of --autoregressive")


OPTIONS = (BenchOptions,)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Compare ways of decoding on your model and prompts: speed, and whether the output is the same."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse(arguments, main.__doc__ or "", *OPTIONS)
    if options.join is not None:
        return join_files(options.join, Console())
    fixed = DraftShape(options.beam_width, options.beam_length)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model, tokenizer = load_verifier(options.base_model, dtype=options.dtype, device=options.device)
    speculator = open_speculator(options.base_model, options.speculator_path, model, tokenizer)
    dataset = options.dataset_name or (None if options.dataset_path else "demo")
    dialogues = load_dialogues(dataset, options.dataset_path, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=options.prompts, max_length=options.max_prompt_length)
    batches = batches_of(prompts, options.batch_size, model.device)
    end_ids = as_tuple(model.generation_config.eos_token_id) if options.reply else ()
    decoding = Decoding(options.new_tokens, end_ids, at_temperature(options.temperature), options.seed)
    lookup = lookup_fits(speculator.verifier, batches, options.new_tokens)
    arms = standard_arms(speculator, decoding, [fixed], lookup=lookup, assistant=assistant_for(options, model))
    console = Console()
    trials = compared(arms, batches, speculator.verifier, decoding, console)
    console.print(arm_table(trials, decoding, model.dtype, options.batch_size))
    if options.batch_size > 1:
        console.print("HF prompt lookup and assisted generation take one prompt at a time: left out.")
    elif not lookup:
        console.print(f"HF prompt lookup needs room for {LOOKUP_TOKENS} tokens more in the context: left out.")
    if options.profile:
        for found in inside(speculator, batches[:5], decoding, fixed):
            console.print(profile_table(found.profile, found.arm))
            console.print(f"{found.arm}: {memory_line(found.memory.mebibytes())}")
    if options.output_file is not None:
        header = {"kind": "circumstances", **provenance(arguments), "options": asdict(options)}
        write_records(Path(options.output_file), [header, *run_records(trials)])
        console.print(f"every run: {options.output_file}")
    return 1 if any(list(bugs(trials, arm.name)) for arm in arms) else 0


def assistant_for(options: BenchOptions, model: PreTrainedModel) -> PreTrainedModel | None:
    """The smaller model, in the verifier's dtype and on its device."""
    if options.assistant_model is None or options.batch_size > 1:
        return None
    dtype = str(model.dtype).removeprefix("torch.")
    return load_verifier(options.assistant_model, dtype=dtype, device=str(model.device))[0]
