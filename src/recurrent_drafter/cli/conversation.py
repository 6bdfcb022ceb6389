"""The commands for understanding: which tokens of one conversation are learned from, and which targets they get."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.cli.options.measuring import ConversationOptions, TargetOptions
from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.data.encoding import EncodedDialogues, TrainExample
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.measure.arms import Decoding
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.ruler import until_end
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.report.document import Columns, terminal
from recurrent_drafter.training.corpus import Pair, pair_of
from recurrent_drafter.training.distillation import distil
from recurrent_drafter.training.examples import loss_mask

CONTEXT, TRAINED = "dim", "bold green"
SCOPES = {"--train_on_assistant_only": True, "without it": False}
SHOWN_TOKENS, SHOWN_CHARACTERS = 16, 40  # of the context's end


def open_conversation(options: ConversationOptions, beyond: int = 0) -> tuple[Pair, Callable[[bool], TrainExample]]:
    """The model, and the conversation as training reads it, by whether that is of the assistant only.

    It is cut so that ``beyond`` more tokens fit the context. Raises DataError where a scope holds nothing to learn.
    """
    name = None if options.dataset_path else options.dataset_name or "demo"
    which = options.conversation
    dialogues = load_dialogues(name, options.dataset_path, "eval" if name else "all", limit=which + 1).dialogues
    if len(dialogues) <= which:
        raise ValueError(f"--conversation is {which}, expected less than {len(dialogues)}: that is all there is")
    pair = pair_of(*load_verifier(options.base_model, dtype=options.dtype, device=options.device))
    context = pair.verifier.context_length
    length = options.model_max_length if context is None else min(options.model_max_length, context - beyond)
    if length < 2:
        raise ValueError(f"{beyond} tokens more do not fit the context of {context} tokens: ask for fewer")

    def example(only: bool) -> TrainExample:
        return next(iter(EncodedDialogues(dialogues[-1:], pair.tokenizer, max_length=length, assistant_only=only)))

    return pair, example


def show_scope(options: ConversationOptions, *, argv: list[str]) -> int:
    pair, example_of = open_conversation(options)
    console = Console(highlight=False)
    key = ("context", "trained") if console.is_terminal else ("context", "[[trained]]")
    examples = {name: example_of(assistant_only) for name, assistant_only in SCOPES.items()}
    for name, example in examples.items():
        console.print(Text.assemble(f"{name}: ", (key[0], CONTEXT), " ", (key[1], TRAINED)))
        console.print(marked(example, pair.tokenizer, color=console.is_terminal), soft_wrap=True, end="\n\n")
    trained = {name: int((example.span_ids >= 0).sum()) for name, example in examples.items()}
    columns: Columns = {
        "scope": str,
        "tokens": lambda name: f"{len(examples[name].input_ids):,}",
        "context only": lambda name: f"{len(examples[name].input_ids) - trained[name]:,}",
        "trained on": lambda name: f"{trained[name]:,}",
        "positions": lambda name: f"{int(loss_mask(examples[name], pair.end_ids).sum()):,}",
    }
    console.print(terminal(list(examples), columns))
    console.print(
        "Every token is read as context in both scopes. Positions are the tokens after which the next ones are\n"
        "learned: those that are trained on, except end tokens and the first token of all.",
        soft_wrap=True,
    )
    return 0


def marked(example: TrainExample, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> Text:
    """The conversation with its two kinds of tokens told apart, by color or by brackets.

    Each stretch is the difference of two decodings from the beginning: some tokenizers write a word otherwise where it
    is decoded alone.
    """
    shown, tokens, end, written = Text(), example.input_ids.tolist(), 0, ""
    for span, stretch in itertools.groupby(example.span_ids.tolist()):
        end += len(list(stretch))
        whole = str(tokenizer.decode(tokens[:end]))
        text, written = whole[len(written) :], whole
        if color:
            shown.append(text, TRAINED if span >= 0 else CONTEXT)
        else:
            shown.append(f"[[{text}]]" if span >= 0 else text)
    return shown


def show_targets(which: ConversationOptions, options: TargetOptions, *, argv: list[str]) -> int:
    count = options.distill_num_future_tokens
    pair, example_of = open_conversation(which, beyond=count)
    example = example_of(options.train_on_assistant_only)
    roots = loss_mask(example, pair.end_ids).nonzero()[: options.positions, 0]
    begun = time.perf_counter()
    (targets,) = distil(pair.verifier, [example.input_ids], [roots], count, pair.end_ids)
    at_once = time.perf_counter() - begun
    scope = "in the assistant's replies" if options.train_on_assistant_only else "of the conversation"
    print(f"{len(example.input_ids)} tokens; at each of {len(roots)} positions {scope} the model's next {count} tokens")
    print(f"\n{'position':>8}  {'the context ends in':>{SHOWN_CHARACTERS}} > tokens generated")
    kinds: Counter[str] = Counter()
    begun = time.perf_counter()
    for root, row in zip(roots.tolist(), targets, strict=True):
        found = row[row != IGNORED].tolist()
        verdict = compared(pair, example.input_ids[: root + 1], found, count)
        kinds[verdict.split()[0]] += 1
        context = one_line(example.input_ids[max(root + 1 - SHOWN_TOKENS, 0) : root + 1].tolist(), pair.tokenizer)
        place = f"{root:>8}  {context[-SHOWN_CHARACTERS:]:>{SHOWN_CHARACTERS}}"
        print(f"{place} > {pieces(found, pair.tokenizer)}  {verdict}", flush=True)
    one_by_one = time.perf_counter() - begun
    print(
        f"\nagainst generate, position by position: {kinds['same']} the same, {kinds['numeric']} numeric ties, "
        f"{kinds['BUG']} bugs\nall positions at once {at_once:.2f} s, position by position {one_by_one:.2f} s"
    )
    return 1 if kinds["BUG"] else 0


def compared(pair: Pair, prefix: Tensor, found: list[int], count: int) -> str:
    """``same``, or what the first difference from transformers' own continuation of a prefix (S,) is."""
    generate: Any = pair.verifier.model.generate
    prompt = prefix[None].to(pair.verifier.device)
    plain = {"do_sample": False, "repetition_penalty": 1.0}  # whatever the model's own settings say
    how = Decoding(count, pair.end_ids, plain).arguments()
    sequences = generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how)
    expected = until_end(sequences[0, len(prefix) :].tolist(), pair.end_ids)
    difference = first_divergence(pair.verifier, prefix, expected, found)
    return "same" if difference is None else f"{difference.verdict}; generate: {pieces(expected, pair.tokenizer)}"


def pieces(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return "|".join(one_line([token], tokenizer) for token in tokens)


def one_line(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens)).replace("\n", "\\n")
