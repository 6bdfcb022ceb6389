"""Prompts: conversations up to where the next reply begins."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.templates import RefusedError, render


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
        ids = _prompt(dialogues[index], len(prompts), tokenizer)
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
