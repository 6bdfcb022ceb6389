"""A package imports only packages that come before it in the documents' order, and the root holds nothing else."""

import ast
import re
from pathlib import Path

import pytest

import recurrent_drafter

PACKAGE = Path(recurrent_drafter.__file__).parent
ORDER = (  # each may import those before it
    *("assets", "core", "records", "data", "models", "decoding", "measure", "training", "formats", "hub"),
    *("bench", "reproduce", "report", "vllm", "cli"),
)


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]


def imported(path: Path) -> set[str]:
    """The packages of ours that a file imports, wherever in it; names that the root exports count as the root's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            names |= {words[1]} if words[0] == "recurrent_drafter" else set()
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("recurrent_drafter.")}
    return names & set(ORDER)


def test_the_root_holds_the_public_names_and_packages_only():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


def test_the_documents_give_this_order_and_files_that_are_there():
    table = (Path(__file__).parents[2] / "docs/design.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*`([\w/]+\.py)` \|$", table, re.M)
    assert tuple(name for name, _ in rows) == ORDER
    assert all((PACKAGE / first).is_file() for _, first in rows)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_the_list(path):
    own = ORDER.index(path.relative_to(PACKAGE).parts[0])
    assert not {name for name in imported(path) if ORDER.index(name) > own}


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.stem)
def test_the_core_knows_tensors_only(path):
    tree = ast.parse(path.read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert roots <= {
        "torch",
        "numpy",
        "recurrent_drafter",
        "collections",
        "dataclasses",
        "functools",
        "itertools",
        "typing",
    }
