"""Imports go to lower layers only."""

import ast
from pathlib import Path

import pytest

import recurrent_drafter

PACKAGE = Path(recurrent_drafter.__file__).parent
LAYERS = {
    0: {"arguments", "assets", "config"},
    1: {"tree", "accept", "beam", "losses", "metrics", "sampling"},
    2: {"drafter", "verifier", "cache", "packing", "data", "hardware"},
    3: {
        *("checkpoints", "decode", "distill", "estimate", "fingerprint", "objective", "pace", "replies", "rows"),
        *("apple", "sampler", "speculator", "stop", "target_shards", "time_budget", "train", "tune", "verify"),
    },
    4: {"bench", "tracking", "hub", "cli", "report", "reproduce", "speculators", "vllm"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recurrent_drafter."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("recurrent_drafter.")}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = LAYER_OF[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    too_high = {name for name in imported(path) if LAYER_OF[name] > own}
    assert not too_high


@pytest.mark.parametrize("name", sorted(LAYERS[1]))
def test_layer_one_knows_tensors_only(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert "transformers" not in roots
