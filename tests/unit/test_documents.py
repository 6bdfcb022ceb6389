"""Links lead somewhere, pages are in the site's contents, and what they quote and show is what the package has."""

import ast
import importlib
import re
import runpy
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def links(document: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", document.read_text()))
    return re.findall(r"\]\(([^)\s]*)\)", prose)


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.M)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them; the site's own are checked by its strict build."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(document)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in links(document):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https" and "." in url.netloc, link
            continue
        target = (document.parent / url.path).resolve() if url.path else document
        assert target.is_file(), link
        assert not url.fragment or url.fragment in anchors(target), link
        if document in PAGES:
            assert target.is_relative_to(DOCS), f"{link}: the site holds docs/ only"


def test_links_are_found():
    assert sum(len(links(document)) for document in DOCUMENTS) > 20


def test_every_page_is_in_the_contents_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for below in (entry if isinstance(entry, list) else entry.values()) for page in pages(below)]

    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(contents)) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_the_reference_names_what_there_is():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_messages_of_the_faq_are_the_packages():
    quoted = [heading.strip("`") for heading in headings(DOCS / "faq.md") if re.fullmatch("`[^`]+`", heading)]
    assert len(quoted) > 20
    said = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    assert not [message for message in quoted if not any(message in text for text in said)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_compile_and_import_what_there_is(document):
    for language, code in FENCE.findall(document.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize("page", ["first-run.md", "faq.md"])
def test_examples_with_the_bundled_model_run(page, capsys):
    blocks = [code for language, code in FENCE.findall((DOCS / page).read_text()) if language == "python"]
    assert blocks
    for code in blocks:
        exec(code, {})


def test_pictures_are_of_today(tmp_path):
    """Drawn anew they say the same words, and the figures in them are on the page of figures."""
    drawing = runpy.run_path(str(ROOT / "dev/draw_pictures.py"))
    drawing["draw"](tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))
    for path in drawn:
        words, kept = (re.findall(r"<text[^>]*>([^<]*)", p.read_text()) for p in (path, DOCS / "pictures" / path.name))
        assert words and words == kept, path.name
    figures = (DOCS / "figures.md").read_text()
    assert not [share for share in drawing["SHARES"].values() if f"{share}" not in figures]
