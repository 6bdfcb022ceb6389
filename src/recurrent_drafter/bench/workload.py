"""Models and prompts to measure with."""

from collections.abc import Callable, Sequence

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


def model_of_shape(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of a known shape with random weights."""
    return random_model(SHAPES[name](), dtype, device)


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


def oracle_for(
    model: PreTrainedModel, hit_rate: float, *, draft_vocab_size: int = DRAFT_VOCABULARY
) -> RecurrentDraftingSpeculator:
    """An oracle with the drafter that would suit the model: E = H, 2 layers; drafts 4 beams of 8 tokens."""
    verifier = Verifier(model)
    torch.manual_seed(0)
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        draft_vocab_size=min(draft_vocab_size, verifier.vocab_size),
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
    parts, total, index = [texts[number]], len(texts[number]), number
    while total < length:
        index = (index + 1) % len(texts)
        parts.append(texts[index])
        total += len(texts[index])
    return torch.cat(parts[::-1])[-length:]


def random_prompts(vocabulary: int, count: int, length: int) -> list[Tensor]:
    """Prompts of random tokens, the same every time: text means nothing to random weights."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(1, vocabulary, (count, length), generator=generator))
