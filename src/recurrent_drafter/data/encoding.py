"""Dialogues to training examples, with the spans that a verifier would have to generate marked exactly.

A conversation is rendered and tokenized once, as a whole, and the characters of its replies (``templates.py``) become
tokens by their offsets. Nothing is encoded a second time, so a token that differs at a seam cannot shift a mask.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.templates import RefusedError, render, render_with_replies


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

    ``truncated`` conversations were cut. Left out: ``too_short`` have no reply within the maximal length (or fewer than
    two tokens), ``without_reply`` have no assistant turn, ``refused`` the chat template rejects or alters.
    """

    dialogues: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
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


class EncodedDialogues:
    """Examples to train on, made of the dialogues anew by every iteration; ``report`` is of the last one, so far.

    With ``assistant_only`` each reply and its end token is a span; without it the whole conversation is span 0. What
    goes beyond ``max_length`` tokens is cut off a conversation, and begins a new example of a plain text. Raises
    DataError for a tokenizer without offsets and, while iterating, for plain text with ``assistant_only``, for a
    template whose marks cover no reply, and at the end when nothing remained.
    """

    def __init__(
        self,
        dialogues: Iterable[Dialogue],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        assistant_only: bool,
    ) -> None:
        if max_length < 2:
            raise DataError(f"a maximal length of {max_length} tokens, expected at least 2")
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets; masks need a fast "
                "one (a tokenizer.json beside the model)"
            )
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset({*special, *tokenizer.all_special_ids})
        self._dialogues, self._tokenizer = dialogues, tokenizer
        self._max_length, self._assistant_only = max_length, assistant_only
        self._counts: Counter[str] = Counter()

    @property
    def report(self) -> EncodeReport:
        return EncodeReport(**self._counts)

    def __iter__(self) -> Iterator[TrainExample]:
        counts = self._counts = Counter()
        refusal = ""
        for dialogue in self._dialogues:
            counts["dialogues"] += 1
            try:
                for ids, spans in self._pieces(dialogue):
                    if len(ids) < 2 or max(spans) < 0:
                        counts["too_short"] += 1
                        continue
                    counts.update(examples=1, tokens=len(ids), trained_tokens=sum(span >= 0 for span in spans))
                    yield TrainExample(torch.tensor(ids, dtype=torch.int64), torch.tensor(spans, dtype=torch.int64))
            except RefusedError as error:
                counts["refused"] += 1
                refusal = refusal or f" ({error})"
        if not counts["examples"]:
            report = self.report
            raise DataError(f"nothing to train on in {report.dialogues:,} dialogues: {report.summary()}{refusal}")

    def _pieces(self, dialogue: Dialogue) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens and span ids of one dialogue: several pieces of a long text, none of what is of no use."""
        if dialogue.text is not None:
            if self._assistant_only:
                raise DataError(
                    "training on assistant turns needs conversations, and this is plain text: leave out "
                    "--train_on_assistant_only, or give conversations"
                )
            yield from self._text(dialogue.text)
        elif self._assistant_only and not dialogue.has_reply:
            self._counts["without_reply"] += 1
        else:
            ids, spans = self._conversation(dialogue.turns)
            self._counts["truncated"] += len(ids) > self._max_length
            yield ids[: self._max_length], spans[: self._max_length]

    def _text(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Pieces of at most ``max_length``, each after the beginning token if there is one."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        opening = self._tokenizer("a")["input_ids"][:1]
        prefix = opening if opening == [self._tokenizer.bos_token_id] else []
        step = self._max_length - len(prefix)
        for start in range(0, len(ids), step):
            piece = ids[start : start + step]
            yield prefix + piece, [-1] * len(prefix) + [0] * len(piece)

    def _conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """A whole conversation, replies beyond ``max_length`` in no span. Raises RefusedError."""
        if self._assistant_only:
            text, intervals = render_with_replies(turns, self._tokenizer)
        else:
            text, intervals = render(turns, self._tokenizer), []
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoding["input_ids"]
        if not self._assistant_only:
            opening = int(ids[:1] == [self._tokenizer.bos_token_id])
            return ids, [-1] * opening + [0] * (len(ids) - opening)
        spans = [-1] * len(ids)
        offsets = encoding["offset_mapping"][: self._max_length]
        for number, interval in enumerate(intervals):
            for position in _span_positions(interval, text, ids, offsets, self._special):
                spans[position] = number
        return ids, spans


def _span_positions(
    interval: tuple[int, int],
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],  # of the tokens that are kept, which may be fewer than ids
    special: frozenset[int],
) -> range:
    """Positions of a reply's tokens, its end token included and nothing after it.

    Templates mark too little (the end token is outside) or too much (the line break after it is inside): the span
    is led on to the special token that follows the reply, over white space only, or back to it.
    """
    start, end = interval
    inside = [position for position, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside:
        return range(0)
    first, last = inside[0], inside[-1]

    def blank(position: int) -> bool:
        a, b = offsets[position]
        return ids[position] not in special and not text[a:b].strip()

    back = next((position for position in range(last, first, -1) if not blank(position)), first)
    if ids[back] in special:
        return range(first, back + 1)
    ahead = next((position for position in range(last + 1, len(offsets)) if not blank(position)), last)
    return range(first, 1 + (ahead if ids[ahead] in special else last))
