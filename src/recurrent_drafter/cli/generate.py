"""``generate_speculator.py`` and ``recurrent-drafter generate``."""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.cli.errors import parse, reporting
from recurrent_drafter.cli.figures import profile_table
from recurrent_drafter.config import DraftShape, GenerateOptions
from recurrent_drafter.data import Turn, encode_prompt
from recurrent_drafter.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.verifier import load_verifier, tokenizer_hash


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Generate with a drafter, or by the verifier alone: one reply, or a chat."""
    (options,) = parse(sys.argv[1:] if argv is None else argv, main.__doc__ or "", GenerateOptions)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    model, tokenizer = load_verifier(options.base_model, dtype=options.dtype, device=options.device)
    speculator = load_speculator(options, model, tokenizer)
    with profiled() if options.profile else nullcontext() as profile:
        if options.prompt is not None:
            reply(speculator, tokenizer, [Turn("user", options.prompt)], options.max_generation_length)
        else:
            chat(speculator, tokenizer, options.max_generation_length)
    if profile is not None:
        Console().print(profile_table(profile))
    return 0


def load_speculator(
    options: GenerateOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter asked for, attached to the model; for ``demo`` the bundled one unless another is named."""
    if options.autoregressive:
        speculator = RecurrentDraftingSpeculator(None)
        speculator.attach_verifier(model)
        return speculator
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


def open_speculator(
    base_model: str, path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter at ``path`` (for ``demo``: the bundled one without it) attached to its model.

    Raises ValueError when none is named or it is for another tokenizer, OSError when it is not there.
    """
    if path is None:
        if base_model != "demo":
            raise ValueError(
                f"no drafter is named for {base_model}: give --speculator_path, train one with "
                f"train_speculator.py --llm_name_or_path {base_model}, or use generate_speculator.py --autoregressive"
            )
        path = str(demo_drafter_path())
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise OSError(f"there is no drafter at {path}: expected the directory that train_speculator.py saved it to")
    speculator = RecurrentDraftingSpeculator.from_pretrained(path, verifier=model)
    assert speculator.drafter is not None
    trained_for, here = speculator.drafter.config.tokenizer_hash, tokenizer_hash(tokenizer)
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
    max_new_tokens: int,
) -> str:
    """Stream one reply to the terminal, then its figures. Ctrl-C ends the reply, not the program."""
    prompt = encode_prompt(turns, tokenizer)[None].to(speculator.verifier.device)
    tokens: list[int] = []
    shown = ""
    begun = time.perf_counter()
    stream = speculator.stream(prompt, max_new_tokens=max_new_tokens)
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


def chat(speculator: RecurrentDraftingSpeculator, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
    """Turn by turn with history, until /quit or the end of the input; /reset forgets the history."""
    print("/reset starts over, /quit ends; Ctrl-C ends a reply.")
    turns: list[Turn] = []
    while True:
        try:
            line = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit ends)")
            continue
        if line == "/quit":
            return
        if line == "/reset":
            turns = []
        elif line:
            asked = [*turns, Turn("user", line)]
            print("\nAssistant: ", end="", flush=True)
            try:
                answer = reply(speculator, tokenizer, asked, max_new_tokens)
            except ValueError as error:  # such as a prompt beyond the context: the session goes on without this turn
                print(f"error: {error} (/reset starts over)", file=sys.stderr)
                continue
            turns = [*asked, Turn("assistant", answer)]
