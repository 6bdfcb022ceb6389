"""Options of what gives a drafter away: deploy and convert."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from recurrent_drafter.records.paths import check_model, check_readable, check_repo_name, is_hub_name, is_path
from recurrent_drafter.training.options import check_paths, option


@dataclass(frozen=True)
class DeployOptions:
    model_path: str = option(..., "the folder that a drafter was saved to")
    repo_name: str = option(..., "user/name on the Hub; made if it is not there yet")
    private: bool = option(False, "a private repository")
    token: str | None = option(
        None, "an access token that may write; better HF_TOKEN or `hf auth login`, which no shell remembers", repr=False
    )
    dry_run: bool = option(False, "write the folder that would be uploaded, and upload nothing")
    output_dir: str | None = option(None, "where --dry_run writes it: default the repository's name and -upload")
    commit_message: str = option("Recurrent drafter", "of the upload")
    base_model: str | None = option(None, "the verifier's name on the Hub, if training used a local copy")
    license: str | None = option(None, "the weights' license as the Hub names it, such as apache-2.0: yours to say")
    bench_file: str | None = option(
        None,
        "figures for the card: what bench wrote with --output_file",
        check=partial(check_readable, flag="--bench_file"),
    )
    unverified: bool = option(False, "publish although verification failed or never ran; the card then says so")

    def __post_init__(self) -> None:
        if self.output_dir is not None and not self.dry_run:
            raise ValueError("--output_dir does nothing without --dry_run")
        if not self.commit_message.strip():
            raise ValueError("--commit_message is empty: expected some text")


@dataclass(frozen=True)
class ConvertOptions:
    source: str = option(..., "a drafter of either layout: a folder or a hub name", positional="SOURCE")
    target: str = option(..., "a new folder, or an empty one", positional="TARGET")
    to: Literal["ours", "apple"] = option(
        "ours", "ours, which vLLM and speculators read too, or apple: ml-recurrent-drafter's"
    )
    verifier: str | None = option(
        None,
        "the model that it drafts for: checked, and named in the result; its weights are not read",
        check=check_model,
    )


def check_deploy(options: DeployOptions) -> None:
    folder = Path(options.model_path).expanduser()
    if not folder.is_dir():
        raise OSError(f"there is no drafter at {folder}: expected the folder that train_speculator.py saved it to")
    check_paths(options)
    check_repo_name(options.repo_name)
    if options.base_model is not None and not is_hub_name(options.base_model):
        raise ValueError(f"--base_model {options.base_model} is no name on the Hub: expected such as gpt2 or user/name")


def check_convert(options: ConvertOptions) -> None:
    target, source = Path(options.target).expanduser(), Path(options.source).expanduser()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OSError(f"{target} exists already: give a new folder, or an empty one")
    if not source.is_dir() and (source.exists() or is_path(options.source)):
        raise OSError(f"there is no drafter at {options.source}: expected a folder, or a name on the Hub")
    check_paths(options)
