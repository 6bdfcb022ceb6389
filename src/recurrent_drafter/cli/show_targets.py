"""``test_distilled_dataset.py``: the paper's distilled dataset, seen and checked on one conversation."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.cli.conversation import open_conversation
from recurrent_drafter.cli.options.measuring import ConversationOptions, TargetOptions
from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.ruler import until_end
from recurrent_drafter.training.corpus import Pair
from recurrent_drafter.training.distillation import distil
from recurrent_drafter.training.examples import loss_mask

SHOWN_TOKENS, SHOWN_CHARACTERS = 16, 40  # of the context's end


def run(which: ConversationOptions, options: TargetOptions, *, argv: Sequence[str]) -> int:
    count = options.distill_num_future_tokens
    opened = open_conversation(which, beyond=count)
    pair, example = opened.pair, opened.example(options.train_on_assistant_only)
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
        print(shown(root, example.input_ids, found, pair.tokenizer) + f"  {verdict}", flush=True)
    one_by_one = time.perf_counter() - begun
    print(
        f"\nagainst generate, position by position: {kinds['same']} the same, {kinds['numeric']} numeric ties, "
        f"{kinds['BUG']} bugs\nall positions at once {at_once:.2f} s, position by position {one_by_one:.2f} s"
    )
    return 1 if kinds["BUG"] else 0


def compared(pair: Pair, prefix: Tensor, found: list[int], count: int) -> str:
    """``same``, or what the first difference from transformers' own continuation of a prefix (S,) is."""
    expected = generated(pair, prefix, count)
    difference = first_divergence(pair.verifier, prefix, expected, found)
    return "same" if difference is None else f"{difference.verdict}; generate: {pieces(expected, pair.tokenizer)}"


def generated(pair: Pair, prefix: Tensor, count: int) -> list[int]:
    generate: Any = pair.verifier.model.generate
    prompt = prefix[None].to(pair.verifier.device)
    sequences = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        repetition_penalty=1.0,  # whatever the model's own settings say: the targets are its plain choice
        eos_token_id=list(pair.end_ids) or None,
        pad_token_id=pair.end_ids[0] if pair.end_ids else 0,
    )
    return until_end(sequences[0, len(prefix) :].tolist(), pair.end_ids)


def shown(root: int, text: Tensor, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    context = one_line(text[max(root + 1 - SHOWN_TOKENS, 0) : root + 1].tolist(), tokenizer)[-SHOWN_CHARACTERS:]
    return f"{root:>8}  {context:>{SHOWN_CHARACTERS}} > {pieces(tokens, tokenizer)}"


def pieces(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return "|".join(one_line([token], tokenizer) for token in tokens)


def one_line(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens)).replace("\n", "\\n")
