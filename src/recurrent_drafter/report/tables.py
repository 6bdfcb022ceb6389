"""Rows as tables, for a document and for the terminal: a column is a title and what it shows of a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from recurrent_drafter.measure.ruler import Estimate

Columns = Mapping[str, Callable[[Any], str]]


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
