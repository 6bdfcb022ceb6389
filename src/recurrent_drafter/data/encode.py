"""Dialogues to tokens, with the spans that a verifier would have to generate marked exactly.

A conversation is rendered and tokenised once, as a whole; the replies' characters (``template.py``) are carried over
to tokens by their offsets. Nothing is encoded a second time, so a token that differs at a seam cannot shift a mask.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.templates import RefusedError, chat_template_of, encode_prompt, render, render_with_replies


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
        """One line for people."""
        line = f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained on"
        notes = {
            "cut at the maximal length": self.truncated,
            "left out without a reply in that length": self.too_short,
            "left out without assistant turn": self.without_reply,
            "refused by the chat template": self.refused,
        }
        return "; ".join([line, *(f"{count:,} {what}" for what, count in notes.items() if count)])


@dataclass(frozen=True)
class _Encoder:
    """The settings that every dialogue of one call shares."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None  # None for texts
    special: frozenset[int]
    max_length: int
    assistant_only: bool


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
    counts = Encoded()
    examples = tuple(
        iterate_examples(
            dialogues,
            tokenizer,
            max_length=max_length,
            assistant_only=assistant_only,
            chat_template=chat_template,
            counts=counts,
        )
    )
    return examples, counts.report()


class Encoded:
    """A running account of `iterate_examples`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dialogues=0, examples=0, tokens=0, trained_tokens=0)
        self.refusal = ""

    def add(self, example: TrainExample) -> None:
        """Count an example."""
        trained = int((example.span_ids >= 0).sum())
        self.counts.update(examples=1, tokens=len(example.input_ids), trained_tokens=trained)

    def report(self) -> EncodeReport:
        """The account so far."""
        return EncodeReport(**self.counts)


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
    encoder = _Encoder(tokenizer, None, frozenset(special), max_length, assistant_only)
    counts = counts or Encoded()
    for dialogue in dialogues:
        counts.counts["dialogues"] += 1
        if dialogue.turns and encoder.template is None:
            encoder = replace(encoder, template=chat_template_of(tokenizer, chat_template))
        try:
            for example in _encode(dialogue, encoder, counts.counts):
                counts.add(example)
                yield example
        except RefusedError as error:
            counts.counts["refused"] += 1
            counts.refusal = counts.refusal or f" ({error})"
    report = counts.report()
    if not report.examples:
        raise DataError(f"nothing to train on in {report.dialogues:,} dialogues: {report.summary()}{counts.refusal}")


def _encode(dialogue: Dialogue, encoder: _Encoder, counts: Counter[str]) -> Iterator[TrainExample]:
    """Yield the examples of one dialogue (several for a long text, none if it is of no use)."""
    if dialogue.text is not None:
        if encoder.assistant_only:
            raise DataError(
                "training on assistant turns needs conversations, and this is plain text: leave out "
                "--train_on_assistant_only, or give conversations"
            )
        pieces = _encode_text(dialogue.text, encoder)
    elif encoder.assistant_only and not dialogue.has_reply:
        counts["without_reply"] += 1
        return
    else:
        ids, spans = _encode_turns(dialogue.turns, encoder)
        counts["truncated"] += len(ids) > len(spans)
        pieces = iter([(ids[: len(spans)], spans)])
    for ids, spans in pieces:
        if len(ids) < 2 or max(spans) < 0:
            counts["too_short"] += 1
        else:
            yield TrainExample(torch.tensor(ids, dtype=torch.int64), torch.tensor(spans, dtype=torch.int64))


def _encode_text(text: str, encoder: _Encoder) -> Iterator[tuple[list[int], list[int]]]:
    """Pieces of at most ``max_length`` tokens, each behind the tokenizer's own beginning token if it uses one."""
    tokenizer = encoder.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = tokenizer("a")["input_ids"][:1]
    prefix = opening if opening == [tokenizer.bos_token_id] else []
    step = encoder.max_length - len(prefix)
    for start in range(0, len(ids), step):
        piece = ids[start : start + step]
        yield prefix + piece, [-1] * len(prefix) + [0] * len(piece)


def _encode_turns(turns: Sequence[Turn], encoder: _Encoder) -> tuple[list[int], list[int]]:
    """All tokens of a conversation, and the span ids of at most ``max_length`` of them."""
    tokenizer, template = encoder.tokenizer, encoder.template
    assert template is not None
    if encoder.assistant_only:
        text, intervals = render_with_replies(turns, tokenizer, template)
    else:
        text, intervals = render(turns, tokenizer, template), []
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    if not encoder.assistant_only:
        opening = int(ids[:1] == [tokenizer.bos_token_id])
        return ids, ([-1] * opening + [0] * (len(ids) - opening))[: encoder.max_length]
    offsets = encoding["offset_mapping"][: encoder.max_length]
    spans = [-1] * len(offsets)
    for number, interval in enumerate(intervals):
        for position in _span_positions(interval, text, ids, offsets, encoder.special):
            spans[position] = number
    return ids, spans


def _span_positions(
    interval: tuple[int, int],
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],  # of the tokens that are kept, which may be fewer than ids
    special: frozenset[int],
) -> range:
    """Positions of a reply's tokens, its end token included and nothing behind it.

    Templates mark too little (the end token is outside) or too much (the line break behind it is inside): the span
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

    back = last
    while back > first and blank(back):
        back -= 1
    if ids[back] in special:
        return range(first, back + 1)
    ahead = last + 1
    while ahead < len(offsets) and blank(ahead):
        ahead += 1
    found = ahead < len(offsets) and ids[ahead] in special
    return range(first, ahead + 1 if found else last + 1)


def prompts_from_dialogues(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
    chat_template: str | None = None,
    fewest: int | None = None,
) -> list[torch.Tensor]:
    """``count`` prompts (S,) int64, S <= ``max_length``, each of another dialogue, for measuring decoding.

    A dialogue is cut before one of its replies (the first for the first dialogue taken, the second for the next and
    so on up to the middle, then from the first again) and ends in the generation prompt; one without replies is cut
    after its first question. Of a plain text the first half stands. ``seed`` draws the order. Raises DataError when
    fewer than ``fewest`` (by default ``count``) fit.
    """
    order = list(range(len(dialogues)))
    random.Random(seed).shuffle(order)
    prompts: list[torch.Tensor] = []
    seen: set[bytes] = set()
    for index in order:
        digest = dialogues[index].digest()
        if len(prompts) == count:
            break
        if digest in seen:
            continue
        seen.add(digest)
        ids = _prompt(dialogues[index], len(prompts), tokenizer, chat_template)
        if 0 < len(ids) <= max_length:
            prompts.append(ids)
    if len(prompts) < (count if fewest is None else fewest):
        raise DataError(
            f"{count} prompts of at most {max_length} tokens were asked of {len(dialogues)} dialogues, which give "
            f"{len(prompts)}: ask for fewer, or allow longer ones"
        )
    return prompts


def _prompt(
    dialogue: Dialogue, number: int, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> torch.Tensor:
    """The ``number``-th prompt (S,), of length 0 if the dialogue gives none."""
    nothing = torch.empty(0, dtype=torch.int64)
    if dialogue.text is not None:
        ids = torch.tensor(tokenizer(dialogue.text, verbose=False)["input_ids"], dtype=torch.int64)
        return ids[: len(ids) // 2]
    turns = dialogue.turns
    asked = [index + 1 for index, turn in enumerate(turns) if turn.role == "user"]
    cuts = [cut for cut in asked if cut < len(turns) and turns[cut].role == "assistant"] or asked[:1]
    if not cuts:
        return nothing
    try:
        return encode_prompt(turns[: cuts[number % (len(cuts) // 2 + 1) % len(cuts)]], tokenizer, chat_template)
    except RefusedError:
        return nothing
