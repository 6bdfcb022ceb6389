"""One dialogue's tokens, with the spans that a verifier would have to generate marked exactly.

A conversation is rendered and tokenized once, as a whole, and the characters of its replies (``templates.py``) become
tokens by their offsets. Nothing is encoded a second time, so a token that differs at a seam cannot shift a mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from recurrent_drafter.data.dialogues import Turn
from recurrent_drafter.data.templates import render, render_with_replies


@dataclass(frozen=True)
class Masker:
    """The settings that all dialogues of one call share."""

    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int]
    max_length: int
    assistant_only: bool

    def text(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens and span ids of pieces of at most ``max_length``, each after the beginning token if there is one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        opening = self.tokenizer("a")["input_ids"][:1]
        prefix = opening if opening == [self.tokenizer.bos_token_id] else []
        step = self.max_length - len(prefix)
        for start in range(0, len(ids), step):
            piece = ids[start : start + step]
            yield prefix + piece, [-1] * len(prefix) + [0] * len(piece)

    def conversation(self, turns: Sequence[Turn], template: str) -> tuple[list[int], list[int]]:
        """All tokens of a conversation, and the span ids of the first ``max_length`` of them. Raises RefusedError."""
        if self.assistant_only:
            text, intervals = render_with_replies(turns, self.tokenizer, template)
        else:
            text, intervals = render(turns, self.tokenizer, template), []
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoding["input_ids"]
        if not self.assistant_only:
            opening = int(ids[:1] == [self.tokenizer.bos_token_id])
            return ids, ([-1] * opening + [0] * (len(ids) - opening))[: self.max_length]
        offsets = encoding["offset_mapping"][: self.max_length]
        spans = [-1] * len(offsets)
        for number, interval in enumerate(intervals):
            for position in _span_positions(interval, text, ids, offsets, self.special):
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
