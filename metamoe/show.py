"""Tables that fit where they are shown, with every name and number in full."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Column, Table

_FRAME = 3
"""Characters that a column takes beside its widest cell: a space on either side, and a line."""


def show_numbers(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of numbers, in several parts below each other where its columns do not fit side by side.

    Args:
        console: where.
        title: of the table.
        header: names of the columns.
        rows: cells; the first of each is its name, which every part has.
    """
    widths = [max(map(len, column)) + _FRAME for column in zip(header, *rows, strict=True)]
    for number, columns in enumerate(_parts(widths, console.width - 1)):
        table = Table(
            *(Column(header[c], no_wrap=True, justify="right" if c else "left") for c in columns),
            title=f"{title} (continued)" if number else title,
        )
        for row in rows:
            table.add_row(*(row[c] for c in columns))
        console.print(table)


def _parts(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """The columns of each part: the first, and as many others as there is room for, but at least one."""
    part, used = [0], widths[0]
    for column in range(1, len(widths)):
        if len(part) > 1 and used + widths[column] > room:
            yield part
            part, used = [0], widths[0]
        part.append(column)
        used += widths[column]
    yield part
