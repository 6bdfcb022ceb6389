"""``recurrent-drafter convert``: a drafter from one layout of checkpoints into another."""

import os
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from recurrent_drafter.cli.inputs import open_outline
from recurrent_drafter.cli.options.publishing import ConvertOptions
from recurrent_drafter.formats.apple import from_apple, is_apples, to_apple
from recurrent_drafter.formats.hub_names import is_hub_name
from recurrent_drafter.hub.publishing import WEIGHTS
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_drafter, tokenizer_hash


def run(options: ConvertOptions, *, argv: list[str]) -> int:
    target = Path(options.target).expanduser()
    drafter = read(located(options.source))
    if options.verifier is not None:
        name_verifier(drafter, options.source, options.verifier)
    write(drafter, target, options.to)
    print(f"{target}: {'this package' if options.to == 'ours' else 'Apple'}'s layout, weights bit for bit as they were")
    if options.verifier is not None and not is_hub_name(options.verifier) and options.verifier != "demo":
        print(f"it names its verifier by a path, {options.verifier}, which other machines do not have")
    if options.to == "ours" and drafter.config.verifier_name_or_path is None:
        print("it names no verifier, so vLLM and speculators cannot open it: --verifier NAME adds it")
    return 0


def located(source: str) -> Path:
    """The folder of a drafter, which is fetched if it is on the Hub. Raises OSError where there is none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", *WEIGHTS]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{source} is no folder, and could not be fetched from the Hub ({reason})") from error


def read(folder: Path) -> RecurrentDrafter:
    return from_apple(folder) if is_apples(folder) else load_drafter(folder)


def name_verifier(drafter: RecurrentDrafter, source: str, name: str) -> None:
    """Put a verifier's name, architecture and tokenizer into the config. Raises ValueError if it is for another."""
    model, tokenizer = open_outline(name, drafter, source)
    named = {"verifier_name_or_path": name, "verifier_architectures": model.config.architectures}
    drafter.config.update({**named, "tokenizer_hash": tokenizer_hash(tokenizer)})


def write(drafter: RecurrentDrafter, target: Path, layout: str) -> None:
    """All of the drafter under its name or nothing. Raises OSError for a full disk and the like."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as unfinished:
            folder = Path(unfinished) / target.name
            folder.mkdir()
            if layout == "apple":
                to_apple(drafter, folder)
            else:
                drafter.save_pretrained(folder)
            os.rename(folder, target)  # fails for a folder that was filled meanwhile
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{target} could not be written ({reason})") from error
