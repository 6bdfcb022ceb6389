"""Where the bundled files lie: the demo verifier, its drafter, and small samples of every dataset kind."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def demo_verifier_path() -> Path:
    """Folder of the bundled demo verifier (GPT-2 architecture, bf16 safetensors, tokenizer with a chat template)."""
    return _ROOT / "demo-verifier"


def demo_drafter_path() -> Path:
    """Folder of the bundled drafter for the demo verifier."""
    return _ROOT / "demo-drafter"


def sample_path(name: str) -> Path:
    """File of a bundled sample, e.g. ``sgd_dev.sharegpt.jsonl.gz``; FileNotFoundError lists the names that exist."""
    path = _ROOT / "data" / name
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in path.parent.iterdir() if p.is_file()))
        raise FileNotFoundError(f"no bundled sample {name!r}; the samples are {names}")
    return path
