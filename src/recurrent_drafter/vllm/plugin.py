"""vLLM's general plugin: recognizes recurrent drafters where vLLM takes a speculative config.

Loaded in every process of vLLM (entry point ``vllm.general_plugins``). It changes what is asked for in a config, and
nothing else; the worker's part begins with `recurrent_drafter.vllm.proposer`, which only a drafter of ours loads.
"""

import logging
from pathlib import Path
from typing import Any

from recurrent_drafter.vllm import compatibility

logger = logging.getLogger(__name__)

METHOD = "recurrent_drafter"  # as `speculators` checkpoints call it
PROPOSER = "recurrent_drafter.vllm.proposer.RecurrentDraftProposer"


def register() -> None:
    """Wrap what builds vLLM's configs. Never raises: a vLLM that does not fit serves everything else as before."""
    configs = tuple(name for name in compatibility.RELIED_ON if ":EngineArgs." in name)
    try:
        compatibility.check(configs)
        compatibility.wrap(configs[0], create_speculative_config)
        compatibility.wrap(configs[1], create_model_config)
    except Exception as error:  # noqa: BLE001
        logger.warning("recurrent drafters cannot be served: %s", error)


def create_model_config(original: Any, engine_args: Any) -> Any:
    """``demo``, which drafters for the bundled verifier name as theirs, is the bundled verifier."""
    if engine_args.model == "demo" and not Path("demo").exists():
        from recurrent_drafter.assets import demo_verifier_path

        engine_args.model = str(demo_verifier_path())
        if engine_args.tokenizer in (None, "demo"):
            engine_args.tokenizer = engine_args.model
    return original(engine_args)


def create_speculative_config(
    original: Any, engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    """A speculative config whose model is a recurrent drafter becomes that of our proposer.

    Raises ValueError for a drafter of another verifier, a draft longer than it was made for, damaged weights, or an
    option that is none; RuntimeError for a vLLM that our proposer does not fit.
    """
    asked = {name.replace("-", "_"): value for name, value in (engine_args.speculative_config or {}).items()}
    for flag, name in (("spec_method", "method"), ("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
        if getattr(engine_args, flag, None) is not None and name not in asked:
            asked[name] = getattr(engine_args, flag)
    if asked.get("method") in (None, METHOD) and asked.get("model") is not None:
        from recurrent_drafter.vllm.checking import joined

        ours = joined(asked, engine_args, target_model_config, target_parallel_config)
        if ours is not None:
            compatibility.check()
            speculative, engine_args.additional_config = ours
            engine_args.speculative_config = {**speculative, "method": "custom_class", "model": PROPOSER}
            engine_args.spec_method = engine_args.spec_model = engine_args.spec_tokens = None
    return original(engine_args, target_model_config, target_parallel_config)
