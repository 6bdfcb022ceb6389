"""Options of a server, and what stands in its way: looked at before anything loads."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from recurrent_drafter.cli.options.decoding import drafter_path, given
from recurrent_drafter.cli.parser import OptionParser
from recurrent_drafter.records.paths import check_drafter, check_model
from recurrent_drafter.training.options import check_least, check_paths, option
from recurrent_drafter.vllm.compatibility import TESTED, installed_version
from recurrent_drafter.vllm.options import ServingOptions

OWN = "serve writes it: --speculator, --beam_width, --beam_length and --drafts say what is in it"
REFUSED = {
    **dict.fromkeys(("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"), OWN),
    "--additional-config": "give it once, as one JSON object",
    "--uds": "serve waits for an answer at a port",
}


@dataclass(frozen=True)
class ServeOptions:
    """What to serve. The first word may be the verifier; flags that are not named here go to vLLM as they are."""

    base_model: str = option(
        ...,
        "verifier: a hub name, a directory, or 'demo' (the bundled model); also without the flag, as the first word",
        aliases=["--model"],
        check=check_model,
    )
    speculator_path: str | None = option(
        None,
        "a trained drafter, a directory or a hub name; for 'demo' the bundled one is used without it",
        aliases=["--speculator"],
        check=check_drafter,
    )
    beam_width: int | None = option(None, "W, beams; default: the drafter's own", least=1)
    beam_length: int | None = option(None, "L, tokens drafted; default: the drafter's own", least=1)
    drafts: Literal["beam", "sampled"] | None = option(
        None,
        "what vLLM verifies for requests that sample: a chain drawn at their temperature (default for one process), "
        "or the best beam",
    )
    shed: bool = option(True, "draft less, or nothing, where it does not pay under load")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "auto: on a GPU as vLLM chooses; on a CPU float32, or bfloat16 where both the checkpoint and the processor are "
        "of it",
    )
    host: str | None = option(None, "address to listen at (default: all)")
    port: int = option(8000, "port to listen at")
    served_model_name: list[str] | None = option(None, "what clients call the model (default: the verifier's name)")
    additional_config: str | None = option(None, "vLLM's, a JSON object, to which the drafter's settings are added")
    any_vllm: bool = option(False, f"try a vLLM other than {TESTED}")
    dry_run: bool = option(False, "check drafter and verifier, print vLLM's command line, start nothing")

    def __post_init__(self) -> None:
        check_least(self)
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}, expected 1 to 65535")
        self.additional  # noqa: B018  (raises for what is wrong in it)

    @property
    def names(self) -> list[str]:
        return self.served_model_name or [self.base_model]

    @property
    def additional(self) -> dict[str, Any]:
        """VLLM's additional config: what was given, and the drafter's settings in it."""
        try:
            config = json.loads(self.additional_config or "{}")
        except ValueError as error:
            raise ValueError(f"--additional_config is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"--additional_config is {self.additional_config}: expected a JSON object")
        own = given(self, "beam_width", "drafts") | ({} if self.shed else {"shed": False})
        return ServingOptions.parse(config, **own).into(config)


def read_serve(parser: OptionParser, argv: Sequence[str]) -> tuple[ServeOptions, list[str]]:
    """The command line as checked options, and the flags for vLLM. Raises ValueError for flags that are ours to set."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--base_model")
    if not flag_names(words) & {"--base-model", "--model", "--help", "-h", "--version"}:
        raise ValueError("no verifier is named: expected recurrent-drafter serve VERIFIER --speculator DRAFTER")
    (options,), flags = parser.known_options(words)
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


def check_serve(options: ServeOptions, flags: Sequence[str]) -> None:
    """Raise for a vLLM that does not serve drafters, a port that is taken, and for paths."""
    if not options.dry_run:
        check_vllm(any_version=options.any_vllm)
        check_port(options.host, options.port)
    drafter_path(options.base_model, options.speculator_path)
    check_paths(options)


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
