"""``recurrent-drafter serve``: vLLM's own OpenAI server with a drafter in it, checked before any model loads."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cli.inputs import open_outline
from recurrent_drafter.cli.options.serving import ServeOptions, flag_names
from recurrent_drafter.cli.server import Server
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import computes_in_bfloat16, load_drafter
from recurrent_drafter.vllm.checking import check_length

ANY_ADDRESS = (None, "0.0.0.0", "::")


def run(options: ServeOptions, flags: Sequence[str], *, argv: list[str]) -> int:
    path = options.drafter()
    drafter = load_drafter(path)
    model, tokenizer = open_outline(options.base_model, drafter, path)
    check_shape(options, drafter, path)
    dtype = chosen_dtype(options.dtype, model)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(options, path, dtype), *flags]
    if options.dry_run:
        print(shlex.join(command))
        return 0
    given = flag_names(flags)
    scheme = "https" if "--ssl-certfile" in given else "http"
    host = "localhost" if options.host in ANY_ADDRESS else str(options.host)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"
    print(f"starting vLLM with {options.base_model} ({dtype}) and the drafter {path}; its log follows", flush=True)
    example = request(url, options, tokenizer, given)

    def announce() -> None:
        print(f"\nserving {options.names[0]} at {url}/v1; for example\n\n  {example}\n")
        print("Ctrl-C ends it and shows what was served.", flush=True)

    return Server(command, url, announce).run()


def check_shape(options: ServeOptions, drafter: RecurrentDrafter, path: str) -> None:
    """Raise ValueError for beams that are longer than the drafter drafts, or too many."""
    most = drafter.config.draft_vocab_size
    if (options.beam_width or 1) > most:
        raise ValueError(f"--beam_width is {options.beam_width}, expected 1 to {most} (the draft vocabulary)")
    check_length(path, drafter.config, options.beam_length or drafter.config.beam_length, "--beam_length")


def chosen_dtype(asked: str, model: PreTrainedModel) -> str:
    """What vLLM computes in. Left alone it turns float32 into bfloat16, which not every CPU has arithmetic for."""
    if asked != "auto" or torch.cuda.is_available():
        return asked
    return "bfloat16" if model.config.dtype == torch.bfloat16 and computes_in_bfloat16("cpu") else "float32"


def arguments(options: ServeOptions, path: str, dtype: str) -> list[str]:
    """Of vLLM's server: the verifier, the drafter, and where to listen."""
    model = str(demo_verifier_path()) if options.base_model == "demo" else options.base_model
    local = Path(path).expanduser()
    speculative: dict[str, Any] = {"model": str(local.resolve()) if local.is_dir() else path}
    if options.beam_length is not None:
        speculative["num_speculative_tokens"] = options.beam_length
    listen = [*([] if options.host is None else ["--host", options.host]), "--port", str(options.port)]
    drafting = ["--speculative-config", json.dumps(speculative), "--additional-config", json.dumps(options.additional)]
    return ["--model", model, "--served-model-name", *options.names, "--dtype", dtype, *listen, *drafting]


def request(url: str, options: ServeOptions, tokenizer: PreTrainedTokenizerBase, given: set[str]) -> str:
    """A command that asks the server something: a chat, or a text to complete where there is no chat template."""
    body: dict[str, Any] = {"model": options.names[0], "max_tokens": 64}
    if tokenizer.chat_template or "--chat-template" in given:
        kind, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello! What can you do?"}]
    else:
        kind, body["prompt"] = "completions", "Once upon a time"
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if "--api-key" in given else []
    return shlex.join(
        ["curl", f"{url}/v1/{kind}", *key, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    )
