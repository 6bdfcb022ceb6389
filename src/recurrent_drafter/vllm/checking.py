"""Whether what vLLM is asked to draft with is a recurrent drafter, and one for this verifier."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.loading import check_pair, check_tokenizer, check_weights
from recurrent_drafter.vllm.options import ServingOptions

Dict = dict[str, Any]


def joined(
    asked: Mapping[str, Any], engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> tuple[Dict, Dict] | None:
    """The speculative and the additional config for a recurrent drafter; None where the model is something else."""
    path, revision = str(asked["model"]), asked.get("revision")
    config = drafter_config(path, revision)
    if config is None:
        return None
    options = ServingOptions.parse(engine_args.additional_config or {}, speculator=path, revision=revision)
    if target_parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size is {target_parallel_config.pipeline_parallel_size}, and a recurrent drafter needs "
            "the verifier's embedding and its last hidden state in one place: use tensor parallelism"
        )
    alone = target_parallel_config.tensor_parallel_size == 1
    if options.drafts == "sampled" and not alone:
        raise ValueError(
            "drafts are drawn by each process for itself, and processes that share a verifier must draft alike: "
            'use "drafts": "beam" with tensor_parallel_size above 1'
        )
    options = replace(options, drafts=options.drafts or ("sampled" if alone else "beam"))
    length = asked.get("num_speculative_tokens") or config.beam_length
    check_length(path, config, length)
    width = config.draft_shape.beam_width if options.beam_width is None else options.beam_width
    if width > config.draft_vocab_size:
        raise ValueError(f"beam_width is {width}, expected at most {config.draft_vocab_size} (the draft vocabulary)")
    check_pair(config, target_model_config.get_hidden_size(), target_model_config.get_vocab_size())
    if not engine_args.skip_tokenizer_init:
        check_tokenizer(path, config, AutoTokenizer.from_pretrained(target_model_config.tokenizer))
    try:
        check_weights(path)
    except OSError as error:
        raise ValueError(str(error)) from error
    kept = {name: value for name, value in asked.items() if name not in ("model", "method", "revision")}
    return {**kept, "num_speculative_tokens": length}, options.into(engine_args.additional_config or {})


def drafter_config(path: str, revision: str | None = None) -> RecurrentDraftingConfig | None:
    """The config of a recurrent drafter in a folder or on the Hub; None where there is none, or another model's."""
    try:
        found, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):
        return None  # a class's path, ngram, a name that vLLM resolves in its own way
    if found.get("model_type") != RecurrentDraftingConfig.model_type:
        return None
    return RecurrentDraftingConfig.from_dict(found)


def check_length(path: str, config: RecurrentDraftingConfig, length: int, name: str = "num_speculative_tokens") -> None:
    """Raise ValueError for more tokens than the drafter drafts."""
    if not 1 <= length <= config.beam_length:
        raise ValueError(
            f"{name} is {length}, and the drafter at {path} drafts at most {config.beam_length}: "
            f"expected 1 to {config.beam_length}"
        )
