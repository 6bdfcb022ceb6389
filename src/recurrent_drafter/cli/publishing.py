"""``recurrent-drafter deploy`` and ``convert``: a drafter on the Hugging Face Hub, and in other layouts."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, snapshot_download
from jinja2 import UndefinedError
from safetensors import SafetensorError

from recurrent_drafter.cli.options.publishing import ConvertOptions, DeployOptions
from recurrent_drafter.formats.apple import from_apple, is_apples, to_apple
from recurrent_drafter.hub.publishing import WEIGHTS, assemble, publish
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import load_drafter, load_outline, tokenizer_hash
from recurrent_drafter.records.paths import TUNING_FILE, is_hub_name
from recurrent_drafter.records.provenance import VERIFICATION_FILE, read_records, read_verification
from recurrent_drafter.report.card import CardFacts, model_card


def deploy(options: DeployOptions, *, argv: list[str]) -> int:
    drafter = Path(options.model_path).expanduser()
    known = gather(drafter, options)
    card = written_card(drafter, known, options.repo_name)

    def fill(folder: Path) -> None:
        assemble(drafter, folder, options.repo_name, card, base_model=known.base_model, verified=bool(known.verified))

    if options.dry_run:
        folder = new_folder(Path(options.output_dir or f"{options.repo_name.partition('/')[2]}-upload").expanduser())
        fill(folder)
        print(f"would upload {folder} to {options.repo_name}; nothing was uploaded")
        return 0
    token = options.token or get_token()
    if token is None:
        raise ValueError("there is no access token: set HF_TOKEN, run `hf auth login`, or give --token")
    with tempfile.TemporaryDirectory() as temporary:
        fill(Path(temporary))
        address = publish(
            Path(temporary), options.repo_name, token=token, private=options.private, message=options.commit_message
        )
    print(f"published: {address}")
    return 0


def written_card(drafter: Path, known: CardFacts, repo_id: str) -> str:
    """The model card. Raises ValueError for records of another form than ours."""
    try:
        return model_card(repo_id, known)
    except (KeyError, TypeError, AttributeError, UndefinedError) as error:
        raise ValueError(
            f"run.json, {TUNING_FILE} or {VERIFICATION_FILE} in {drafter}, or --bench_file, is not as this version "
            f"writes it ({error!r}): make it again or take it away"
        ) from error


def gather(drafter: Path, options: DeployOptions) -> CardFacts:
    """Everything that is known of the drafter in a folder.

    Raises OSError where there is none or its files are damaged, ValueError unless it passed verification.
    """
    model = load_drafter(drafter)
    base_model = options.base_model or model.config.verifier_name_or_path
    if base_model is None:
        raise ValueError(f"the drafter at {drafter} does not say which model it is for: give --base_model")
    if base_model != "demo" and not is_hub_name(base_model):
        print(f"card and config name the verifier by a path, {base_model}: --base_model gives its name on the Hub")
    try:
        verified = read_verification(drafter)
    except ValueError as reason:
        if not options.unverified:
            raise ValueError(f"{reason}; --unverified publishes it all the same, and says so") from None
        print(f"not verified: {reason}")
        verified = {}
    return CardFacts(
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        base_model=base_model,
        license=options.license,
        run=read(drafter / "run.json"),
        verified=verified,
        tuning=read(drafter / TUNING_FILE),
        bench=() if options.bench_file is None else read_bench(Path(options.bench_file).expanduser()),
    )


def read(path: Path) -> dict[str, Any]:
    """A record beside the drafter; empty where there is none. Raises ValueError for one that cannot be read."""
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): mend it or take it away") from None
    return record


def read_bench(path: Path) -> list[dict[str, Any]]:
    try:
        records = read_records(path)
        if {record["kind"] for record in records} >= {"circumstances", "run"}:
            return records
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--bench_file {path} is not what recurrent-drafter bench --output_file writes")


def new_folder(path: Path) -> Path:
    """Make it. Raises OSError for one that holds something already, or that cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = any(path.iterdir())
    except OSError as error:
        raise OSError(f"{path} cannot be written to ({error.strerror}): --output_dir names another folder") from error
    if held:
        raise OSError(f"{path} is not empty: --output_dir names another folder")
    return path


def convert(options: ConvertOptions, *, argv: list[str]) -> int:
    target = Path(options.target).expanduser()
    drafter = open_drafter(located(options.source))
    if options.verifier is not None:
        model, tokenizer = load_outline(options.verifier, drafter, options.source)
        named = {"verifier_name_or_path": options.verifier, "verifier_architectures": model.config.architectures}
        drafter.config.update({**named, "tokenizer_hash": tokenizer_hash(tokenizer)})
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


def open_drafter(folder: Path) -> RecurrentDrafter:
    return from_apple(folder) if is_apples(folder) else load_drafter(folder)


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
