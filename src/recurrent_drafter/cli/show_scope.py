"""``demonstrate_training_scope.py``: which tokens of a conversation are context, and which are learned from."""

import itertools
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.cli.conversation import open_conversation
from recurrent_drafter.cli.options.measuring import ConversationOptions
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.training.examples import loss_mask

CONTEXT, TRAINED = "dim", "bold green"
SCOPES = {"--train_on_assistant_only": True, "without it": False}


def run(options: ConversationOptions, *, argv: Sequence[str]) -> int:
    opened = open_conversation(options)
    tokenizer, end_ids = opened.pair.tokenizer, opened.pair.end_ids
    console = Console(highlight=False)
    key = ("context", "trained") if console.is_terminal else ("context", "[[trained]]")
    counts = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("scope", "tokens", "context only", "trained on", "positions"):
        counts.add_column(column, justify="left" if column == "scope" else "right")
    for name, assistant_only in SCOPES.items():
        example = opened.example(assistant_only)
        console.print(Text.assemble(f"{name}: ", (key[0], CONTEXT), " ", (key[1], TRAINED)))
        console.print(marked(example, tokenizer, color=console.is_terminal), soft_wrap=True, end="\n\n")
        total, trained = len(example.input_ids), int((example.span_ids >= 0).sum())
        positions = int(loss_mask(example, end_ids).sum())
        counts.add_row(name, *(f"{count:,}" for count in (total, total - trained, trained, positions)))
    console.print(counts)
    console.print(
        "Every token is read as context in both scopes. Positions are the tokens after which the next ones are\n"
        "learned: those that are trained on, except end tokens and the first token of all.",
        soft_wrap=True,
    )
    return 0


def marked(example: TrainExample, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> Text:
    """The conversation with its two kinds of tokens told apart, by color or by brackets."""
    shown = Text()
    for text, trained in runs(example, tokenizer):
        if color:
            shown.append(text, TRAINED if trained else CONTEXT)
        else:
            shown.append(f"[[{text}]]" if trained else text)
    return shown


def runs(example: TrainExample, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Stretches of text, each with whether it is trained on.

    Each is the difference of two decodings from the beginning: some tokenizers write a word otherwise where it is
    decoded alone.
    """
    tokens, end, written = example.input_ids.tolist(), 0, ""
    for span, stretch in itertools.groupby(example.span_ids.tolist()):
        end += len(list(stretch))
        whole = str(tokenizer.decode(tokens[:end]))
        yield whole[len(written) :], span >= 0
        written = whole
