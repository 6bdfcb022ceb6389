"""Chat templates: conversations as text, where in that text the replies stand, and prompts for the next reply.

Places are intervals of *characters*. They come from the template's ``{% generation %}`` marks or, for a template
without marks, from renderings of the conversation's beginnings, each checked to be a beginning of the whole. A
conversation whose replies cannot be placed exactly is refused.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn

# The layout of Vicuna 1.1, for tokenizers that bring no template of their own.
VICUNA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] | trim + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] | trim + ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class RefusedError(DataError):
    """A conversation that the chat template rejects, or in which a reply cannot be placed exactly."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, else Vicuna's layout (which needs an end token)."""
    if tokenizer.chat_template is not None:
        return str(tokenizer.get_chat_template())
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has neither a chat template nor an end token: give it one of them")
    return VICUNA_TEMPLATE


def render_with_replies(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and per reply the characters from the end of the generation prompt to the reply's end.

    Whether the end token lies inside an interval is the template's affair. Raises RefusedError.
    """
    text, intervals = _render(turns, tokenizer, generation_prompt=False)
    replies = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if intervals is None:
        return text, [_locate(text, turns, index, tokenizer) for index in replies]
    if replies and not any(end > start for start, end in intervals):
        raise DataError("the chat template's generation marks cover no reply: mend them, or take them out")
    if len(intervals) == len(replies):
        # transformers counts characters wrongly for marks inside a Jinja macro: the interval then misses the end.
        for (start, end), index in zip(intervals, replies, strict=True):
            if turns[index].content.strip()[-16:] not in text[start:end]:
                raise RefusedError(f"the chat template's generation marks miss the reply in turn {index + 1}")
    return text, intervals


def render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool = False) -> str:
    """The conversation as the template writes it; RefusedError if the template rejects it."""
    return _render(turns, tokenizer, generation_prompt)[0]


def _render(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generation_prompt: bool
) -> tuple[str, list[tuple[int, int]] | None]:
    """Text, and the intervals under generation marks of a template that has marks."""
    template = chat_template_of(tokenizer)
    marked = bool(_MARKS.search(template))
    try:
        render_all: Any = render_jinja_template  # annotated as if it returned one string
        texts, intervals = render_all(
            [[{"role": turn.role, "content": turn.content} for turn in turns]],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise RefusedError(f"the chat template rejects a conversation: {error}") from error
    return texts[0], intervals[0] if marked else None


def _locate(text: str, turns: Sequence[Turn], index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Characters of reply ``index``, by the prompt that precedes it; the end token is left outside."""
    if index == 0:
        raise RefusedError("the conversation begins with a reply, and the chat template has no generation marks")
    prompt = render(turns[:index], tokenizer, generation_prompt=True)
    content = turns[index].content.strip()  # many templates strip it
    start = text.find(content, len(prompt))
    if not text.startswith(prompt) or start < 0:
        raise RefusedError(f"turn {index + 1} cannot be placed exactly in what the chat template writes")
    return len(prompt), start + len(content)


def encode_prompt(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens (S,) int64 of a conversation up to where the next reply begins; RefusedError if the template objects."""
    text = render(turns, tokenizer, generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def prompts_from_dialogues(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_length: int,
    seed: int = 0,
    fewest: int | None = None,
) -> list[torch.Tensor]:
    """``count`` prompts (S,) int64, S <= ``max_length``, each of another dialogue, for measuring decoding.

    A dialogue is cut before one of its replies (the first for the first dialogue taken, the second for the next and
    so on up to the middle, then from the first again) and ends in the generation prompt; one without replies is cut
    after its first question. Of a plain text the first half stands. ``seed`` draws the order. Raises DataError when
    fewer than ``fewest`` (by default ``count``) fit.
    """
    order = list(dialogues)
    random.Random(seed).shuffle(order)
    prompts: list[torch.Tensor] = []
    for dialogue in {dialogue.digest(): dialogue for dialogue in order}.values():
        if len(prompts) == count:
            break
        ids = _prompt(dialogue, len(prompts), tokenizer)
        if 0 < len(ids) <= max_length:
            prompts.append(ids)
    if len(prompts) < (count if fewest is None else fewest):
        raise DataError(
            f"{count} prompts of at most {max_length} tokens were asked of {len(dialogues)} dialogues, which give "
            f"{len(prompts)}: ask for fewer, or allow longer ones"
        )
    return prompts


def _prompt(dialogue: Dialogue, number: int, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
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
        return encode_prompt(turns[: cuts[number % (len(cuts) // 2 + 1) % len(cuts)]], tokenizer)
    except RefusedError:
        return nothing
