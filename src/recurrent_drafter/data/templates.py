"""Chat templates: conversations as text, and where in that text the replies stand.

Places are intervals of *characters*. They come from the template's ``{% generation %}`` marks or, for a template
without marks, from renderings of the conversation's beginnings, each checked to be a beginning of the whole. A
conversation whose replies cannot be placed exactly is refused.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from recurrent_drafter.data.dialogues import DataError, Turn

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
