"""Dialogues to training examples, with an account of what became of them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
        chat_template: str | None = None,
    ) -> None:
        if max_length < 2:
            raise DataError(f"a maximal length of {max_length} tokens, expected at least 2")
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets; masks need a fast "
                "one (a tokenizer.json beside the model)"
            )
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._masker = Masker(tokenizer, frozenset(special), max_length, assistant_only)
        self._dialogues, self._chat_template = dialogues, chat_template
        self._counts: Counter[str] = Counter()

    @property
    def report(self) -> EncodeReport:
        return EncodeReport(**self._counts)

    def __iter__(self) -> Iterator[TrainExample]:
        counts = self._counts = Counter()
        template, refusal = None, ""
        for dialogue in self._dialogues:
            counts["dialogues"] += 1
            if dialogue.turns and template is None:  # texts need none
                template = chat_template_of(self._masker.tokenizer, self._chat_template)
            try:
                for ids, spans in self._pieces(dialogue, template or ""):
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

    def _pieces(self, dialogue: Dialogue, template: str) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens and span ids of one dialogue: several pieces of a long text, none of what is of no use."""
        masker = self._masker
        if dialogue.text is not None:
            if masker.assistant_only:
                raise DataError(
                    "training on assistant turns needs conversations, and this is plain text: leave out "
                    "--train_on_assistant_only, or give conversations"
                )
            yield from masker.text(dialogue.text)
        elif masker.assistant_only and not dialogue.has_reply:
            self._counts["without_reply"] += 1
        else:
            ids, spans = masker.conversation(dialogue.turns, template)
            self._counts["truncated"] += len(ids) > len(spans)
            yield ids[: len(spans)], spans
