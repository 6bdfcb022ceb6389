"""Rows as tables, for a document and for the terminal: a column is a title and what it shows of a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Columns = Mapping[str, Callable[[Any], str]]


def markdown(rows: Iterable[Any], columns: Columns) -> str:
    """Of a document.

    >>> print(markdown([("a", 1)], {"name": lambda row: row[0], "count": lambda row: str(row[1])}), end="")
    | name | count |
    | --- | --- |
    | a | 1 |
    """
    return piped([list(columns), *([show(row) for show in columns.values()] for row in rows)])


def piped(lines: Sequence[Sequence[str]]) -> str:
    """Cells in Markdown, the first line being the titles."""
    titles, *rows = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in (titles, ["---"] * len(titles), *rows))


def terminal(rows: Iterable[Any], columns: Columns, title: str = "", left: Sequence[str] = ()) -> Table:
    """Of the terminal: the first column and those named in ``left`` begin at the left, all others are figures."""
    names = list(columns)
    table = Table(title=title or None, box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))  # 80 columns are few
    for name in names:
        at_left = name == names[0] or name in left
        table.add_column(name, justify="left" if at_left else "right", no_wrap=name == names[0])
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()))
    return table
