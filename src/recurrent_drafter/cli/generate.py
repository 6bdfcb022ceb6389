"""``generate_speculator.py`` and ``recurrent-drafter generate``."""

import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.cli.errors import INTERRUPTED, parse, reporting
from recurrent_drafter.cli.figures import profile_table
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.config import DraftShape, GenerateOptions, SamplingOptions, SpeculatorOptions
from recurrent_drafter.data import Turn, encode_prompt
from recurrent_drafter.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.verifier import load_verifier

OPTIONS = SpeculatorOptions, SamplingOptions, GenerateOptions


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Generate with a drafter, or by the verifier alone: one reply, or a chat."""
    which, sampling, options = parse(sys.argv[1:] if argv is None else argv, main.__doc__ or "", *OPTIONS)
    how = {**sampling.arguments(), "seed": sampling.seed, "max_new_tokens": options.max_generation_length}
    if options.autoregressive and which.speculator_path:
        raise ValueError("--autoregressive uses no drafter: drop --speculator_path")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = autoregression(model) if options.autoregressive else load_speculator(which, model, tokenizer)
    with profiled() if options.profile else nullcontext() as profile:
        if options.prompt is not None:
            _, interrupted = reply(speculator, tokenizer, [Turn("user", options.prompt)], how)
            code = INTERRUPTED if interrupted else 0
        else:
            code = chat(speculator, tokenizer, how)
    if profile is not None:
        Console().print(profile_table(profile))
    return code


def autoregression(model: PreTrainedModel) -> RecurrentDraftingSpeculator:
    """The same loop without a drafter."""
    speculator = RecurrentDraftingSpeculator(None)
    speculator.attach_verifier(model)
    return speculator


def load_speculator(
    options: SpeculatorOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter asked for, attached to the model; for ``demo`` the bundled one unless another is named."""
    speculator = open_speculator(options.base_model, options.speculator_path, model, tokenizer)
    assert speculator.drafter is not None
    saved = speculator.drafter.config.draft_shape
    if any(given is not None for given in (options.beam_width, options.beam_length, options.max_tree_nodes)):
        speculator.shape = DraftShape(
            saved.beam_width if options.beam_width is None else options.beam_width,
            saved.beam_length if options.beam_length is None else options.beam_length,
            options.max_tree_nodes,
        )
    return speculator


def reply(
    speculator: RecurrentDraftingSpeculator,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    how: dict[str, Any],
) -> tuple[str, bool]:
    """Stream one reply to the terminal, then its figures. Returns its text, and whether Ctrl-C ended it."""
    tokens: list[int] = []
    shown, interrupted = "", False
    begun = time.perf_counter()
    try:
        prompt = encode_prompt(turns, tokenizer)[None].to(speculator.verifier.device)
        with closing(speculator.stream(prompt, **how)) as stream:
            for new in stream:
                tokens += new
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for its other bytes
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
    except KeyboardInterrupt:
        interrupted = True
        print(" [interrupted]", end="")
    seconds = time.perf_counter() - begun
    per_step = f", {speculator.stats.tokens_per_step:.2f} tokens/step" if len(tokens) > 1 else ""
    print(f"\n\nGenerated {len(tokens)} tokens in {seconds:.2f} s ({len(tokens) / seconds:.1f} tok/s{per_step})")
    return shown, interrupted


def chat(speculator: RecurrentDraftingSpeculator, tokenizer: PreTrainedTokenizerBase, how: dict[str, Any]) -> int:
    """Turn by turn with history, until /quit or the end of the input; /reset forgets the history."""
    print("/reset starts over, /quit ends; Ctrl-C ends a reply.")
    turns: list[Turn] = []
    while True:
        try:
            line = input("\nYou: ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(/quit ends)")
            continue
        if line == "/quit":
            return 0
        if line == "/reset":
            turns = []
        elif line:
            asked = [*turns, Turn("user", line)]
            print("\nAssistant: ", end="", flush=True)
            try:
                answer, _ = reply(speculator, tokenizer, asked, how)
            except ValueError as error:  # such as a prompt beyond the context: the session goes on without this turn
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            turns = [*asked, Turn("assistant", answer)]
