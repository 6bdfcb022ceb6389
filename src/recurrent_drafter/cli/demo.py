"""``recurrent-drafter demo`` (``make demo``): train a drafter for the bundled model, then see what it is worth."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.compare import ArmResult, Generate, compare
from recurrent_drafter.cli import train
from recurrent_drafter.cli.errors import parse, reporting
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.data import load_dialogues, prompts_from_dialogues
from recurrent_drafter.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.stop import as_tuple
from recurrent_drafter.verifier import Verifier, load_verifier

NEVER = -1  # an end token that no vocabulary has: generation goes on


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


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter for the bundled model in four minutes, then compare it with plain generation."""
    (options,) = parse(sys.argv[1:] if argv is None else argv, main.__doc__ or "", DemoOptions)
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
    drafters = {"bundled drafter": open_speculator(str(demo_drafter_path()), model, tokenizer)}
    if trained is not None:
        drafters["your drafter"] = open_speculator(trained, model, tokenizer)
    differing = 0
    console = Console()
    for protocol, end_ids in (("sustained", (NEVER,)), ("reply", as_tuple(model.generation_config.eos_token_id))):
        arms = make_arms(model, drafters, options.new_tokens, list(end_ids))
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{protocol}: {len(prompts)} prompts, {len(arms)} arms", total=len(prompts))
            results = compare(arms, prompts, Verifier(model), done=partial(progress.advance, task))
        console.print(table(protocol, results, options.new_tokens, str(model.dtype).removeprefix("torch.")))
        for result in results:
            differing += len(result.bugs)
            for bug in result.bugs:
                console.print(f"DIFFERS: {result.name}, {bug}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"{len(prompts)} held-out prompts, {torch.get_num_threads()} threads; peak memory {peak:,.0f} MiB")
    return 1 if differing else 0


def make_arms(
    model: PreTrainedModel, drafters: dict[str, RecurrentDraftingSpeculator], new_tokens: int, end_ids: list[int]
) -> dict[str, Generate]:
    """HF generate first: it is the reference for equality."""
    config = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": end_ids, "pad_token_id": 0}

    def hf_generate(prompt: Tensor) -> tuple[list[int], None]:
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **config)  # type: ignore[operator]
        return output[0, prompt.shape[1] :].tolist(), None

    def ours(speculator: RecurrentDraftingSpeculator) -> Generate:
        def generate(prompt: Tensor) -> tuple[list[int], int]:
            steps = list(speculator.stream(prompt, max_new_tokens=new_tokens, end_ids=end_ids))
            return [token for step in steps for token in step], speculator.stats.steps

        return generate

    alone = RecurrentDraftingSpeculator(None)
    alone.attach_verifier(model)
    arms: dict[str, Generate] = {"HF generate": hf_generate, "autoregression": ours(alone)}
    return arms | {name: ours(speculator) for name, speculator in drafters.items()}


def table(protocol: str, results: Sequence[ArmResult], new_tokens: int, dtype: str) -> Table:
    """One protocol's figures."""
    what = (
        f"exactly {new_tokens} new tokens" if protocol == "sustained" else f"up to the end token, at most {new_tokens}"
    )
    title = f"{protocol} ({what}), greedy, {dtype}, batch 1"
    shown = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))  # fits 80 columns
    for column in ("", "tok/s", "tok/step", "vs HF", "vs autoregr.", "identical"):
        shown.add_column(column, justify="left" if not column else "right")
    reference, alone = results[0], results[1]
    for result in results:
        rate = float(torch.tensor(result.rates).median())
        per_step = f"{result.tokens_per_step:.2f}" if result.tokens_per_step == result.tokens_per_step else ""
        ratios = [
            "{:.2f} ({:.2f}-{:.2f})".format(*result.speedup(base)) if result is not base else ""
            for base in (reference, alone)
        ]
        shown.add_row(result.name, f"{rate:.1f}", per_step, *ratios, "" if result is reference else result.equality)
    return shown
