"""Documents in Markdown, made of templates, and their other form: one HTML page that needs nothing else."""

import base64
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt

from recurrent_drafter.report.tables import cell


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
