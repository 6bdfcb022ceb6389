"""Engines of vLLM in this process, and requests that join and leave them."""

import gc
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["OMP_NUM_THREADS"] = "1"  # two threads of vLLM's spin against each other

from contextlib import contextmanager

import torch
from vllm import LLM
from vllm.platforms import current_platform

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path  # noqa: E402
from recurrent_drafter.bench.workload import demo_prompts  # noqa: E402
from recurrent_drafter.models.loading import load_verifier  # noqa: E402

DRAFTER = str(demo_drafter_path())
_register = type(current_platform).register_triton_kernel_overrides
_registered = []


def _register_once(cls):  # a second engine in a process trips over the first one's
    if not _registered:
        _register()
        _registered.append(True)


type(current_platform).register_triton_kernel_overrides = classmethod(_register_once)


@contextmanager
def engine(model: str | None = None, *, speculation: bool = True, ours: dict | None = None, **options):
    """An engine for the demo verifier, drafting with the bundled drafter or not at all."""
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 128 << 20,
        "disable_log_stats": False,
    }
    if speculation:
        settings["speculative_config"] = {"model": DRAFTER}
        settings["additional_config"] = {"recurrent_drafter": {"shed": False, **(ours or {})}}
    llm = LLM(model or str(demo_verifier_path()), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompts(count: int, length: int) -> list[list[int]]:
    """Held-out conversations of the demo data."""
    _, tokenizer = load_verifier("demo", dtype="float32")
    return [prompt.tolist() for prompt in demo_prompts(tokenizer, count, length)]


def complete(llm, requests, joins=None):
    """Outputs of (prompt ids, sampling parameters), each added before the step that ``joins`` names."""
    engine, outputs, step = llm.llm_engine, {}, 0
    joins = joins or [0] * len(requests)
    waiting = sorted(range(len(requests)), key=lambda index: (joins[index], index))
    while waiting or engine.has_unfinished_requests():
        while waiting and joins[waiting[0]] <= step:
            index = waiting.pop(0)
            ids, parameters = requests[index]
            engine.add_request(str(index), {"prompt_token_ids": ids}, parameters)
        step += 1
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id.split("-")[0])] = output.outputs[0]
    return [outputs[index] for index in range(len(requests))]


def metric(llm, name: str) -> float:
    [found] = [m.value for m in llm.get_metrics() if m.name == f"vllm:{name}"]
    return found


def set_seed(seed: int) -> None:
    torch.manual_seed(seed)
