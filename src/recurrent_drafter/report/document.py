"""Documents made of templates, in Markdown or as one HTML page that needs nothing else; tables there and elsewhere."""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from recurrent_drafter.measure.ruler import Estimate

Columns = Mapping[str, Callable[[Any], str]]  # titles, and what each shows of a row


def fill(template: str, **known: Any) -> str:
    """A template of this package with its gaps filled. Raises `jinja2.UndefinedError` for one of unknown content.

    Templates write ``form`` for Python's `format`, and ``cell`` around free text in a table.
    """
    environment = Environment(
        loader=PackageLoader("recurrent_drafter.report", "templates"),
        autoescape=select_autoescape(),  # pages, not Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"form": format, "cell": cell}
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(known)).strip() + "\n"


def page(text: str, pictures: Mapping[str, bytes]) -> str:
    """A document that begins with its title, without scripts, and without anything that would have to be fetched.

    ``pictures`` are its SVG drawings by the addresses that the text has for them.
    """
    parser = MarkdownIt("js-default")  # what looks like HTML is shown as it is written
    tokens = parser.parse(text)
    contents = {}
    for heading, words in pairwise(tokens):
        if (heading.type, heading.tag) == ("heading_open", "h2"):
            anchor = "".join(letter if letter.isalnum() else "-" for letter in words.content.lower())
            heading.attrSet("id", anchor)
            contents[anchor] = words.content
    for part in (child for token in tokens for child in token.children or () if child.type == "image"):
        drawn = base64.b64encode(pictures[unquote(str(part.attrs["src"]))]).decode()
        part.attrSet("src", f"data:image/svg+xml;base64,{drawn}")
    title, body = (parser.renderer.render(some, parser.options, {}) for some in (tokens[:3], tokens[3:]))
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return fill("page.html", name=tokens[1].content, title=title, contents=contents, body=body)


def markdown(rows: Iterable[Any], columns: Columns) -> str:
    """Of a document.

    >>> print(markdown([("a", 1)], {"name": lambda row: row[0], "count": lambda row: str(row[1])}), end="")
    | name | count |
    | --- | --- |
    | a | 1 |
    """
    return markdown_table(list(columns), [[show(row) for show in columns.values()] for row in rows]) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under the names of their columns, in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: object) -> str:
    """Text that stays in its cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def estimated(record: Mapping[str, Any], name: str) -> str:
    """An estimate as a record holds it; nothing where older files lack it."""
    return f"{Estimate(*record.get(name, [float('nan')])):.2f}"


def terminal(
    rows: Iterable[Any], columns: Columns, title: str = "", *, left: Sequence[str] = (), tight: bool = False
) -> Table:
    """Of the terminal: the first column and those named in ``left`` begin at the left, all others are figures.

    ``tight``: as near as columns can stand, and only the last may be broken: 80 characters hold most then.
    """
    names = list(columns)
    table = Table(title=title or None, box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 0 if tight else 1))
    for name in names:
        at_left = name == names[0] or name in left
        table.add_column(name, justify="left" if at_left else "right", no_wrap=tight and name != names[-1])
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table
