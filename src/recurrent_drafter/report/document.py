"""A report as a list of sections, and its two forms: one HTML file that needs nothing else, and Markdown."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader

from recurrent_drafter.report.tables import Columns, markdown_table


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str

    def markdown(self, _: str) -> str:
        return self.text


@dataclass(frozen=True)
class Code:
    """Something to type, or to read as it was written."""

    kind: ClassVar[str] = "code"
    text: str

    def markdown(self, _: str) -> str:
        return f"```\n{self.text}\n```"


@dataclass(frozen=True)
class Items:
    kind: ClassVar[str] = "items"
    lines: Sequence[str]

    def markdown(self, _: str) -> str:
        return "\n".join(f"- {line}" for line in self.lines)


@dataclass(frozen=True)
class Table:
    """Figures under their names; the first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, caption: str, rows: Iterable[Any], columns: Columns) -> "Table":
        """Rows as the columns show them."""
        return cls(caption, list(columns), [[show(row) for show in columns.values()] for row in rows])

    def markdown(self, _: str) -> str:
        return f"{self.caption}\n\n{markdown_table(self.columns, self.rows)}"


@dataclass(frozen=True)
class Picture:
    """An SVG drawing, with what it shows in words for those who cannot see it."""

    kind: ClassVar[str] = "picture"
    name: str
    caption: str
    svg: bytes

    @property
    def uri(self) -> str:
        """The drawing itself, as an address."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()

    def markdown(self, folder: str) -> str:
        return f"![{self.caption}]({folder}/{self.name}.svg)\n\n*{self.caption}*"


Block = Paragraph | Code | Items | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading, and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Document:
    title: str
    sections: Sequence[Section]

    def html(self) -> str:
        """One page without scripts, and without anything that would have to be fetched."""
        environment = Environment(
            loader=PackageLoader("recurrent_drafter.report", "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html").render(document=self)

    def markdown(self, pictures: str) -> str:
        """The same, with pictures in a folder of that name."""
        parts = [f"# {self.title}"]
        for section in self.sections:
            parts += [f"## {section.title}", *(block.markdown(pictures) for block in section.blocks)]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> list[Path]:
        """``NAME.html``, ``NAME.md`` and the latter's pictures; the files for people to open."""
        pictures = [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / "pictures" / f"{picture.name}.svg").write_bytes(picture.svg)
        page, text = folder / f"{name}.html", folder / f"{name}.md"
        page.write_text(self.html(), encoding="utf-8")
        text.write_text(self.markdown("pictures"), encoding="utf-8")
        return [page, text]
