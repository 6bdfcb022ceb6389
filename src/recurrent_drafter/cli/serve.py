"""``recurrent-drafter serve``: vLLM's own OpenAI server with a drafter in it, checked before any model loads."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cli.errors import parse_known, reporting
from recurrent_drafter.cli.server import Server
from recurrent_drafter.cli.speculator import drafter_path
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import (
    check_pair,
    check_tokenizer,
    computes_in_bfloat16,
    load_drafter,
    load_outline,
)
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.vllm.checking import check_length
from recurrent_drafter.vllm.compatibility import TESTED, installed_version
from recurrent_drafter.vllm.options import ServingOptions

ANY_ADDRESS = (None, "0.0.0.0", "::")
OWN = "serve writes it: --speculator, --beam_width, --beam_length and --drafts say what is in it"
REFUSED = {
    **dict.fromkeys(("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"), OWN),
    "--additional-config": "give it once, as one JSON object",
    "--uds": "serve waits for an answer at a port",
}


@dataclass(frozen=True)
class ServeOptions:
    """What to serve. The first word may be the verifier; flags that are not named here go to vLLM as they are."""

    base_model: str = field(
        metadata={
            "aliases": ["--model"],
            "help": "verifier: a hub name, a directory, or 'demo' (the bundled model); also without the flag, as the "
            "first word",
        }
    )
    speculator_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--speculator"],
            "help": "a trained drafter, a directory or a hub name; for 'demo' the bundled one is used without it",
        },
    )
    beam_width: int | None = field(default=None, metadata={"help": "W, beams; default: the drafter's own"})
    beam_length: int | None = field(default=None, metadata={"help": "L, tokens drafted; default: the drafter's own"})
    drafts: Literal["beam", "sampled"] | None = field(
        default=None,
        metadata={
            "help": "what vLLM verifies for requests that sample: a chain drawn at their temperature (default for one "
            "process), or the best beam"
        },
    )
    shed: bool = field(default=True, metadata={"help": "draft less, or nothing, where it does not pay under load"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "auto: on a GPU as vLLM chooses; on a CPU float32, or bfloat16 where both the checkpoint and the "
            "processor are of it"
        },
    )
    host: str | None = field(default=None, metadata={"help": "address to listen at (default: all)"})
    port: int = field(default=8000, metadata={"help": "port to listen at"})
    served_model_name: list[str] | None = field(
        default=None, metadata={"help": "what clients call the model (default: the verifier's name)"}
    )
    additional_config: str | None = field(
        default=None, metadata={"help": "vLLM's, a JSON object, to which the drafter's settings are added"}
    )
    any_vllm: bool = field(default=False, metadata={"help": f"try a vLLM other than {TESTED}"})
    dry_run: bool = field(
        default=False, metadata={"help": "check drafter and verifier, print vLLM's command line, start nothing"}
    )

    def __post_init__(self) -> None:
        for name in ("beam_width", "beam_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}, expected 1 to 65535")
        self.additional  # noqa: B018  (raises for what is wrong in it)

    @property
    def names(self) -> list[str]:
        """What clients call the model."""
        return self.served_model_name or [self.base_model]

    @property
    def additional(self) -> dict[str, Any]:
        """VLLM's additional config: what was given, and the drafter's settings in it."""
        try:
            given = json.loads(self.additional_config or "{}")
        except ValueError as error:
            raise ValueError(f"--additional_config is not JSON ({error})") from None
        if not isinstance(given, dict):
            raise ValueError(f"--additional_config is {self.additional_config}: expected a JSON object")
        asked = {"beam_width": self.beam_width, "drafts": self.drafts, "shed": self.shed and None}
        own = {name: value for name, value in asked.items() if value is not None}
        return ServingOptions.parse(given, **own).into(given)


OPTIONS = (ServeOptions,)


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Serve a model with a drafter, by vLLM's own OpenAI server. Flags not listed here go to vLLM as they are."""
    options, flags = parsed(sys.argv[1:] if argv is None else argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not options.dry_run:
        check_vllm(any_version=options.any_vllm)
        check_port(options.host, options.port)
    path = drafter_path(options.base_model, options.speculator_path)
    drafter = load_drafter(path)
    model, tokenizer = load_outline(options.base_model)
    verifier = Verifier(model)
    check_pair(drafter.config, verifier.hidden_size, verifier.vocab_size)
    check_tokenizer(path, drafter.config, tokenizer)
    check_shape(options, drafter, path)
    dtype = chosen_dtype(options.dtype, model)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(options, path, dtype), *flags]
    if options.dry_run:
        print(shlex.join(command))
        return 0
    given = flag_names(flags)
    scheme = "https" if "--ssl-certfile" in given else "http"
    url = f"{scheme}://{'localhost' if options.host in ANY_ADDRESS else bracketed(options.host)}:{options.port}"
    print(f"starting vLLM with {options.base_model} ({dtype}) and the drafter {path}; its log follows", flush=True)

    example = request(url, options, tokenizer, given)

    def announce() -> None:
        print(f"\nserving {options.names[0]} at {url}/v1; for example\n\n  {example}\n")
        print("Ctrl-C ends it and shows what was served.", flush=True)

    return Server(command, url, announce).run()


def parsed(argv: Sequence[str]) -> tuple[ServeOptions, list[str]]:
    """The command line as checked options, and the flags for vLLM. Raises ValueError for flags that are ours to set."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--base_model")
    if not flag_names(words) & {"--base-model", "--model", "--help", "-h"}:
        raise ValueError("no verifier is named: expected recurrent-drafter serve VERIFIER --speculator DRAFTER")
    (options,), flags = parse_known(words, main.__doc__ or "", *OPTIONS)
    for name in flag_names(flags):
        if (advice := REFUSED.get(name)) is not None:
            raise ValueError(f"{name} cannot be given here: {advice}")
    if flags and not flags[0].startswith("-"):
        raise ValueError(f"{flags[0]!r} belongs to no flag: the verifier is named first, or with --base_model")
    return options, flags


def flag_names(flags: Sequence[str]) -> set[str]:
    """The names of vLLM's flags, spelled with hyphens.

    >>> sorted(flag_names(["--max_model_len", "256", "--spec-model=x", "--additional-config.a", "1"]))
    ['--additional-config', '--max-model-len', '--spec-model']
    """
    return {word.split("=")[0].split(".")[0].replace("_", "-") for word in flags if word.startswith("-")}


def check_vllm(*, any_version: bool) -> None:
    """Raise ValueError unless vLLM is here, of the tested version, and will find this package's plugin."""
    version = installed_version()
    if version is None:
        raise ValueError(
            f"vLLM is not installed beside {sys.executable}: pip install 'recurrent-drafter[vllm]', or on a CPU as the "
            "serving guide says"
        )
    if version.partition("+")[0] != TESTED and not any_version:
        raise ValueError(
            f"vLLM {version} is installed, and this was tested with {TESTED}: pip install 'vllm=={TESTED}', or try "
            "with --any_vllm"
        )
    plugins = metadata.entry_points(group="vllm.general_plugins")
    own = [plugin.name for plugin in plugins if plugin.value.startswith("recurrent_drafter.")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not own or (allowed is not None and own[0] not in allowed.split(",")):
        raise ValueError(
            "vLLM will not find the plugin of recurrent-drafter: pip install the package beside vLLM, anew after an "
            f"update of a checkout{'' if allowed is None else f', and name it in VLLM_PLUGINS ({allowed})'}"
        )


def check_port(host: str | None, port: int) -> None:
    """Raise OSError unless the port can be listened at."""
    family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host or "", port))
        except OSError as error:
            raise OSError(
                f"port {port} of {host or 'this machine'} cannot be listened at ({error.strerror}): give another with "
                "--port"
            ) from None


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


def bracketed(host: str | None) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if host and ":" in host else str(host)
