"""What is measured: cells that vary one factor at a time, models and prompts."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recurrent_drafter.bench.oracle import OracleDraft, OracleDrafter
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.verifier import Verifier

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2-small-shape": GPT2Config,
    "llama-160m-shape": lambda: LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        max_position_embeddings=2048,
    ),
}
WEIGHT_SCALE = 4.0  # of random matrices, beyond transformers' own: so that greedy output varies
DRAFT_VOCABULARY = 8192
DEMO = "demo"
FACTORS: dict[str, Sequence[Any]] = {"batch": (2, 4, 8, 16), "context": (64, 512, 896), "temperature": (0.7, 1.0)}
HIT_RATES = (0.0, 0.3, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class BenchCell:
    """One combination: every arm runs on the same prompts of exactly ``context`` tokens, ``batch`` at a time.

    ``hit_rate``: of an oracle drafter; None is the model's trained one.
    """

    name: str
    model: str
    dtype: str
    batch: int = 1
    context: int = 128
    temperature: float = 0.0
    hit_rate: float | None = None


def all_cells(models: Sequence[str], base_dtype: str) -> list[BenchCell]:
    """The grid: for the demo model its factors, for a shape every hit rate in both dtypes."""
    dtypes = sorted(("float32", "bfloat16"), key=lambda dtype: dtype != base_dtype)
    cells: list[BenchCell] = []
    for model in models:
        if model == DEMO:
            base = BenchCell(f"{DEMO}/base", DEMO, base_dtype)
            cells += [base, replace(base, name=f"{DEMO}/{dtypes[1]}", dtype=dtypes[1])]
            for factor, values in FACTORS.items():
                cells += [replace(base, name=f"{DEMO}/{factor}-{value:g}", **{factor: value}) for value in values]
        else:
            for dtype, rate in itertools.product(dtypes, HIT_RATES):
                cells.append(BenchCell(f"{model}/{dtype}/oracle-{rate:g}", model, dtype, hit_rate=rate))
    return cells


def selected(cells: Sequence[BenchCell], patterns: Sequence[str]) -> list[BenchCell]:
    """Those whose name one of the shell patterns matches. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell matches {pattern!r}, expected a name or pattern among those that --list shows")
    return [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in patterns)]


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Random weights, the same every time, with which greedy output varies and never ends."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight is not embedding:
                weight.mul_(WEIGHT_SCALE)
    return model.to(device=device, dtype=dtype)


def oracle_for(model: PreTrainedModel, hit_rate: float) -> RecurrentDraftingSpeculator:
    """An oracle with the drafter that would suit the model: E = H, 2 layers; drafts 4 beams of 8 tokens."""
    verifier = Verifier(model)
    torch.manual_seed(0)
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        draft_vocab_size=min(DRAFT_VOCABULARY, verifier.vocab_size),
        beam_width=4,
        beam_length=8,
    )
    speculator = RecurrentDraftingSpeculator(OracleDrafter(config, hit_rate), drafting=OracleDraft)
    speculator.attach_verifier(model)
    return speculator


def demo_prompts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[Tensor]:
    """``count`` prompts of exactly ``length`` tokens from held-out conversations of the demo data.

    Each ends as a conversation does before a reply; in front of it come others, the foremost cut to the length. There
    are as many different ends as conversations, about 300; beyond that fewer prompts are returned.
    """
    dialogues = load_dialogues("demo", None, "eval").dialogues
    whole = prompts_from_dialogues(dialogues, tokenizer, count=len(dialogues) - 1, max_length=1 << 20)
    return [behind_others(whole, number, length) for number in range(min(count, len(whole)))]


def behind_others(texts: Sequence[Tensor], number: int, length: int) -> Tensor:
    """The last ``length`` tokens of text ``number`` with as many of the texts after it in front as that takes.

    >>> texts = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7])]
    >>> behind_others(texts, 0, 4).tolist()
    [4, 5, 1, 2]
    """
    text = texts[number]
    while len(text) < length:
        number = (number + 1) % len(texts)
        text = torch.cat([texts[number], text])
    return text[-length:]


def random_prompts(vocabulary: int, count: int, length: int) -> list[Tensor]:
    """Prompts of random tokens, the same every time: text means nothing to random weights."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(1, vocabulary, (count, length), generator=generator))
