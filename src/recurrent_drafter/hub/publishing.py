"""Publishing on the Hugging Face Hub: `assemble` makes a drafter's folder, `publish` uploads it as one commit."""

import re
import shutil
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, constants, errors

from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.records.paths import TUNING_FILE
from recurrent_drafter.records.provenance import VERIFICATION_FILE

RECORDS = ("run.json", TUNING_FILE, VERIFICATION_FILE)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
GENERATE = '''"""Decodes with the recurrent drafter of this repository; README.md says how to call it."""

from recurrent_drafter.hub import generate_with_drafter


def generate(model, **arguments):
    """As `model.generate`: the same tokens in fewer steps."""
    return generate_with_drafter(model, "{repo_id}", __file__, **arguments)
'''
ACCESS_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # its client's: httpx or httpx2


def assemble(drafter: Path, folder: Path, repo_id: str, card: str, *, base_model: str, verified: bool) -> None:
    """Fill an empty folder with what is published: the drafter's own files, its card, and the code.

    The config names ``base_model`` as the verifier, which others serve it with, and not the folder that it was trained
    from. A record of a verification that does not count is left out.
    Raises ValueError, before anything is written, where one of the records holds an access token.
    """
    names = [name for name in RECORDS if verified or name != VERIFICATION_FILE]
    records = [drafter / name for name in names if (drafter / name).is_file()]
    for record in records:
        if ACCESS_TOKEN.search(record.read_bytes()):
            raise ValueError(f"{record} holds what looks like an access token: take it out before publishing")
    weights = sorted(file for pattern in WEIGHTS for file in drafter.glob(pattern))
    config = RecurrentDraftingConfig.from_pretrained(drafter)
    config.update({"verifier_name_or_path": base_model})
    config.save_pretrained(folder)
    for file in (*weights, *records):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    code = folder / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(GENERATE.format(repo_id=repo_id))
    (code / "requirements.txt").write_text(f"recurrent-drafter>={metadata.version('recurrent-drafter')}\n")


def publish(folder: Path, repo_id: str, *, token: str, private: bool, message: str) -> str:
    """Upload a folder as one commit, into a new repository or over an older drafter; returns the commit's address.

    Raises OSError, in one line that does not hold the token, for whatever the Hub or the network objects to, and
    ValueError for a repository of something else, or a public one where ``private`` is asked for.
    """
    api = HfApi(token=token, library_name="recurrent-drafter")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        _refuse_other(api, repo_id, private)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=[*RECORDS, *WEIGHTS]
        )
    except (OSError, http_error, RuntimeError) as error:  # RuntimeError: of hf_xet, which carries large files
        raise OSError(f"{repo_id} was not published: {_reason(error).replace(token, '***')}") from None
    return done.commit_url


def _refuse_other(api: HfApi, repo_id: str, private: bool) -> None:
    """What lies there already must be a drafter or nothing, and no more public than was asked for."""
    info = api.model_info(repo_id)
    held = (info.config or {}).get("model_type")
    if held not in (None, "recurrent_drafter"):
        raise ValueError(f"{repo_id} exists and holds a model of type {held!r}: choose another name")
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, and --private was asked for: make it private in its settings first, or "
            "choose another name"
        )


def _reason(error: Exception) -> str:
    """Why the Hub or the way to it failed, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not know this access token (401): expected one that may write"
    if status == 403:
        return "this access token may not write there (403): expected one of the owner, with write access"
    if status is None and isinstance(error, http_error):
        return f"the Hub at {constants.ENDPOINT} cannot be reached ({str(error).strip() or type(error).__name__})"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
