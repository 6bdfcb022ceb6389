"""Names of the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_repo_name(repo_id: str) -> None:
    """Raise ValueError, in one line, for a name that the Hub would refuse, or one without its owner."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"not a name for a repository: {str(error).rstrip('.')}; expected user/name") from None
    if "/" not in repo_id:
        raise ValueError(f"the repository {repo_id!r} has no owner: expected user/name or organization/name")


def is_hub_name(name: str) -> bool:
    """Whether a verifier's name can be linked: not the bundled one, and no path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "demo" and not Path(name).expanduser().exists()
