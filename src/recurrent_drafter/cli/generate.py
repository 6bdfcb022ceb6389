"""``generate_speculator.py`` and ``recurrent-drafter generate``."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.cli.errors import parse, reporting
from recurrent_drafter.config import DraftShape, GenerateOptions, SamplingOptions, SpeculatorOptions
from recurrent_drafter.data import Turn, encode_prompt
from recurrent_drafter.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.verifier import load_verifier, tokenizer_hash


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Generate with a drafter, or by the verifier alone: one reply, or a chat."""
    which, sampling, options = parse(
        sys.argv[1:] if argv is None else argv, main.__doc__ or "", SpeculatorOptions, SamplingOptions, GenerateOptions
    )
    how = {**sampling.arguments(), "seed": sampling.seed, "max_new_tokens": options.max_generation_length}
    if options.autoregressive and which.speculator_path:
        raise ValueError("--autoregressive uses no drafter: drop --speculator_path")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = autoregression(model) if options.autoregressive else load_speculator(which, model, tokenizer)
    if options.prompt is not None:
        reply(speculator, tokenizer, [Turn("user", options.prompt)], how)
        return 0
    return chat(speculator, tokenizer, how)


def autoregression(model: PreTrainedModel) -> RecurrentDraftingSpeculator:
    """The same loop without a drafter."""
    speculator = RecurrentDraftingSpeculator(None)
    speculator.attach_verifier(model)
    return speculator


def load_speculator(
    options: SpeculatorOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter asked for, attached to the model; for ``demo`` the bundled one unless another is named."""
    path = options.speculator_path
    if path is None:
        if options.base_model != "demo":
            raise ValueError(
                f"no drafter is named for {options.base_model}: give --speculator_path, train one with "
                f"train_speculator.py --llm_name_or_path {options.base_model}, or use --autoregressive"
            )
        path = str(demo_drafter_path())
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OSError(f"there is no drafter at {path}: expected the directory that train_speculator.py saved it to")
    speculator = RecurrentDraftingSpeculator.from_pretrained(path)
    assert speculator.drafter is not None
    trained_for, here = speculator.drafter.config.tokenizer_hash, tokenizer_hash(tokenizer)
    saved = speculator.drafter.config.draft_shape
    if any(given is not None for given in (options.beam_width, options.beam_length, options.max_tree_nodes)):
        speculator.shape = DraftShape(
            saved.beam_width if options.beam_width is None else options.beam_width,
            saved.beam_length if options.beam_length is None else options.beam_length,
            options.max_tree_nodes,
        )
    speculator.attach_verifier(model)
    if trained_for is not None and trained_for != here:
        raise ValueError(
            f"the drafter at {path} is for another tokenizer (vocabulary {trained_for}, this model's is {here}): use "
            "it with the model that it was trained for, or train one for this model"
        )
    return speculator


def reply(
    speculator: RecurrentDraftingSpeculator,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    how: dict[str, Any],
) -> str:
    """Stream one reply to the terminal, then its figures. Ctrl-C ends the reply, not the program."""
    prompt = encode_prompt(turns, tokenizer)[None].to(speculator.verifier.device)
    tokens: list[int] = []
    shown = ""
    begun = time.perf_counter()
    stream = speculator.stream(prompt, **how)
    try:
        for new in stream:
            tokens += new
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for its other bytes
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    finally:
        stream.close()
    seconds = time.perf_counter() - begun
    print(f"\n\nGenerated {len(tokens)} tokens in {seconds:.2f} s ({len(tokens) / seconds:.1f} tok/s, "
          f"{speculator.stats.tokens_per_step:.2f} tokens/step)")  # fmt: skip
    return shown


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
                answer = reply(speculator, tokenizer, asked, how)
            except ValueError as error:  # such as a prompt beyond the context: the session goes on without this turn
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            turns = [*asked, Turn("assistant", answer)]
