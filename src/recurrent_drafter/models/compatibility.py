"""Which models can verify a tree, and why others cannot."""

import inspect

from transformers import PreTrainedModel

# These attend to both sides unless their config says that they are decoders.
LOOKS_AHEAD = {
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
OWN_WINDOW = {"moshi"}  # transformers 5.19: the sliding window of its config does not reach its mask


def why_unsuitable(model: PreTrainedModel) -> str | None:
    """Why trees cannot be verified exactly with this model, or a drafter not be made for it; None if they can."""
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    foreign = sorted(kinds - {"full_attention", "sliding_attention", "global"})
    if getattr(config, "attention_chunk_size", None) and not kinds:
        foreign = ["chunked_attention"]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return "it has no language-model head"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, expected a decoder alone"
    if getattr(model, "_is_stateful", False):
        return "it carries a recurrent state from token to token, which cannot branch along a tree"
    if foreign:
        return f"it has layers of type {', '.join(foreign)}, and a tree is exact with full and sliding attention only"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model.forward).parameters:
        return "it derives positions from the order of the tokens (as ALiBi does) and takes no position_ids for a tree"
    if config._attn_implementation not in ("sdpa", "eager"):
        return (
            f"its attention {config._attn_implementation!r} takes no mask for a tree; load it with "
            "attn_implementation='sdpa'"
        )
    if (otherwise := _attends_otherwise(model)) is not None:
        return otherwise
    read, embedded = head.weight.shape[-1], embedding.weight.shape[-1]  # type: ignore[union-attr, index]
    if read != embedded:
        return f"its head reads a width of {read}, its embedding has {embedded}, and a drafter needs one for both"
    return None


def _attends_otherwise(model: PreTrainedModel) -> str | None:
    """What is wrong with models that keep no cache, or whose masks are not a decoder's or not those of their config."""
    config = model.config.get_text_config()
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return "it keeps no key-value cache"
    if config.model_type in LOOKS_AHEAD and not config.is_decoder:
        return "it attends to what comes after a token as well; load it with is_decoder=True"
    if config.model_type in OWN_WINDOW:
        return "its attention window is not the one that its config describes"
    return None
