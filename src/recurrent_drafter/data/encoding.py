"""Dialogues to training examples, with an account of what became of them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.data.dialogues import DataError, Dialogue
from recurrent_drafter.data.masks import Masker
from recurrent_drafter.data.templates import RefusedError, chat_template_of


@dataclass(frozen=True)
class TrainExample:
    """Tokens of one example, and which generated span each belongs to.

    ``input_ids`` (S,) int64. ``span_ids`` (S,) int64: k >= 0 on the tokens of the k-th span that the verifier would
    have to generate (a reply with its end token, or the whole text), -1 on context and on the beginning token.

        <|user|> Hi <|end|> <|assistant|> Hello ! <|end|> <|user|> Bye <|end|> <|assistant|> Bye <|end|>
           -1    -1   -1         -1         0   0    0       -1     -1   -1         -1        1     1
    """

    input_ids: torch.Tensor
    span_ids: torch.Tensor


@dataclass(frozen=True)
class EncodeReport:
    """What became of the dialogues: ``examples`` of ``tokens`` tokens, ``trained_tokens`` of them inside spans.

    ``truncated`` conversations were cut. Left out: ``too_short`` have no reply within ``max_length`` (or fewer than
    two tokens), ``without_reply`` have no assistant turn, ``refused`` the chat template rejects or alters.
    """

    dialogues: int
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int = 0
    too_short: int = 0
    without_reply: int = 0
    refused: int = 0

    def summary(self) -> str:
        line = f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained on"
        notes = {
            "cut at the maximal length": self.truncated,
            "left out without a reply in that length": self.too_short,
            "left out without assistant turn": self.without_reply,
            "refused by the chat template": self.refused,
        }
        return "; ".join([line, *(f"{count:,} {what}" for what, count in notes.items() if count)])


@dataclass
class Encoded:
    """A running account of `iterate_examples`; ``refusal`` is the first reason of a chat template."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dialogues=0, examples=0, tokens=0, trained_tokens=0))
    refusal: str = ""

    def add(self, example: TrainExample) -> None:
        trained = int((example.span_ids >= 0).sum())
        self.counts.update(examples=1, tokens=len(example.input_ids), trained_tokens=trained)

    def report(self) -> EncodeReport:
        return EncodeReport(**self.counts)


def encode_examples(
    dialogues: Iterable[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    assistant_only: bool,
    chat_template: str | None = None,
) -> tuple[tuple[TrainExample, ...], EncodeReport]:
    """Encode dialogues for training; whatever is left out is counted in the report.

    With ``assistant_only`` each reply and its end token is a span; without it the whole conversation is span 0. What
    goes beyond ``max_length`` tokens is cut off a conversation, and begins a new example of a plain text. Raises
    DataError when nothing remains, for plain text with ``assistant_only``, for a template whose marks cover no reply,
    and for a tokenizer without offsets.
    """
    account = Encoded()
    examples = iterate_examples(
        dialogues,
        tokenizer,
        max_length=max_length,
        assistant_only=assistant_only,
        chat_template=chat_template,
        counts=account,
    )
    return tuple(examples), account.report()


def iterate_examples(
    dialogues: Iterable[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    assistant_only: bool,
    chat_template: str | None = None,
    counts: Encoded | None = None,
) -> Iterator[TrainExample]:
    """As `encode_examples`, one example after another; the error of a source without any comes at its end."""
    if max_length < 2:
        raise DataError(f"a maximal length of {max_length} tokens, expected at least 2")
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets; masks need a fast one "
            "(a tokenizer.json beside the model)"
        )
    special = set(tokenizer.all_special_ids)
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    masker = Masker(tokenizer, frozenset(special), max_length, assistant_only)
    account = counts or Encoded()
    template = None  # looked up at the first conversation: texts need none
    for dialogue in dialogues:
        account.counts["dialogues"] += 1
        if dialogue.turns and template is None:
            template = chat_template_of(tokenizer, chat_template)
        try:
            for example in _encode(dialogue, masker, template, account.counts):
                account.add(example)
                yield example
        except RefusedError as error:
            account.counts["refused"] += 1
            account.refusal = account.refusal or f" ({error})"
    report = account.report()
    if not report.examples:
        raise DataError(f"nothing to train on in {report.dialogues:,} dialogues: {report.summary()}{account.refusal}")


def _encode(dialogue: Dialogue, masker: Masker, template: str | None, counts: Counter[str]) -> Iterator[TrainExample]:
    """Yield the examples of one dialogue (several for a long text, none if it is of no use)."""
    if dialogue.text is not None:
        if masker.assistant_only:
            raise DataError(
                "training on assistant turns needs conversations, and this is plain text: leave out "
                "--train_on_assistant_only, or give conversations"
            )
        pieces = masker.text(dialogue.text)
    elif masker.assistant_only and not dialogue.has_reply:
        counts["without_reply"] += 1
        return
    else:
        assert template is not None
        ids, spans = masker.conversation(dialogue.turns, template)
        counts["truncated"] += len(ids) > len(spans)
        pieces = iter([(ids[: len(spans)], spans)])
    for ids, spans in pieces:
        if len(ids) < 2 or max(spans) < 0:
            counts["too_short"] += 1
        else:
            yield TrainExample(torch.tensor(ids, dtype=torch.int64), torch.tensor(spans, dtype=torch.int64))
