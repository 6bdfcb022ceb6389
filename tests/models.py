"""Tiny random models of many architectures, whose outputs vary enough that a leaked mask shows."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from recurrent_drafter import RecurrentDrafter, RecurrentDraftingConfig
from recurrent_drafter.assets import demo_drafter_path

VOCABULARY, WIDTH, WINDOW, LONGEST_PROMPT = 97, 64, 8, 12
SMALL = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 256}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
OPT = {
    "hidden_size": WIDTH,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
# Name: model type and options. "-window" attends to fewer tokens than any prompt has; "-mixed" in one of two layers.
ARCHITECTURES = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", GROUPED),
    "llama-one-key": ("llama", {**COMMON, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-mixed": ("qwen2", {**GROUPED, **MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16}),
    "qwen3-mixed": ("qwen3", {**GROUPED, **MIXED, "head_dim": 16, "use_sliding_window": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 16}),
    "gemma2-mixed": ("gemma2", {**GROUPED, **MIXED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3-mixed": ("gemma3_text", {**GROUPED, **MIXED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi": ("phi", COMMON),
    "phi3": ("phi3", {**GROUPED, "original_max_position_embeddings": 256}),
    "phi3-window": ("phi3", {**GROUPED, "original_max_position_embeddings": 256, "sliding_window": WINDOW}),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": WIDTH}),
    "opt-projected": ("opt", {**OPT, "hidden_size": 2 * WIDTH, "word_embed_proj_dim": WIDTH}),
    "gpt_neox": ("gpt_neox", COMMON),
    "falcon": ("falcon", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 0.25}),
    "gpt_oss-mixed": (
        "gpt_oss",
        {**GROUPED, **MIXED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": ROPE},
    ),
}
SINKS = {"gpt_oss-mixed"}  # transformers 5.19 computes them in eager attention only


def attentions_of(name: str) -> list[str]:
    """The attentions that transformers has for an architecture above, its own choice first."""
    return ["eager"] if name in SINKS else ["sdpa", "eager"]


def tiny_model(name: str, attention: str = "sdpa", **options):
    """A model of an architecture above, or of any model type if its options are given; float32, end tokens off."""
    model_type, own = ARCHITECTURES.get(name, (name, {}))
    torch.manual_seed(5)
    config = CONFIG_MAPPING[model_type](**{**SMALL, **own, **options})
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # so that outputs vary and a leaked mask shows
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def random_drafter(seed: int = 0, **options) -> RecurrentDrafter:
    torch.manual_seed(seed)
    return RecurrentDrafter(RecurrentDraftingConfig(hidden_size=WIDTH, vocab_size=VOCABULARY, **options)).eval()


def save_wrong_drafters(folder: Path) -> None:
    """Small drafters for the demo verifier, each with the one thing wrong that its folder is named after."""
    made_for = RecurrentDraftingConfig.from_pretrained(demo_drafter_path())
    right = {"hidden_size": made_for.hidden_size, "vocab_size": made_for.vocab_size, "verifier_name_or_path": "other"}
    small = {"num_draft_layers": 0, "draft_vocab_size": 8, "exit_dim": 8}
    wrong = {"width": ("hidden_size", 32), "vocabulary": ("vocab_size", 99), "tokenizer": ("tokenizer_hash", "0" * 16)}
    for name, (field, value) in wrong.items():
        config = RecurrentDraftingConfig(**{**right, **small, field: value})
        RecurrentDrafter(config).save_pretrained(folder / name)


def prompts(batch: int, seed: int = 1):
    """Left-padded prompts of different lengths, the first of `LONGEST_PROMPT`: ids and attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, LONGEST_PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return ids, mask


def generate(model, ids, mask, new=40, **options):
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)
