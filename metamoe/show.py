"""Tables that fit where they are shown, with every cell in full."""

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_NUMBERS = re.compile(r"[-+±\[\]\d.,% ]*")
_LONGEST_WORD = 24
"""A longer one may be broken: the path of an array, a hash."""


def show_table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    grouped: bool = False,
    styles: Mapping[int, str] | None = None,
) -> None:
    """Print a table whose cells are all in full, at any width.

    What is too wide for the terminal is wrapped between words, and what is still too wide comes in several tables below each
    other, each with the first column. A number is never broken. In a file, or for another program, a row is a line.

    Args:
        console: where to.
        header: names of the columns; columns of numbers are set to the right.
        rows: their cells.
        title: above the table.
        grouped: a line parts rows whose first cells differ.
        styles: for rows by their number, if they have one.
    """
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(header)]
    widest = [max(map(cell_len, column)) for column in columns]
    if not console.is_terminal:
        parts = [list(zip(range(len(header)), widest, strict=True))]
    else:
        parts = _parts(widest, [_narrowest(column) for column in columns], console.width)
    for number, part in enumerate(parts):
        table = Table(title=None if number or title is None else Text(title), width=_total([width for _, width in part]))
        for i, width in part:
            right = i > 0 and _is_numbers(columns[i])
            table.add_column(Text(header[i]), justify="right" if right else "left", width=width, overflow="fold")
        for i, row in enumerate(rows):
            last = grouped and i + 1 < len(rows) and rows[i + 1][0] != row[0]
            table.add_row(*(Text(row[column]) for column, _ in part), style=(styles or {}).get(i), end_section=last)
        console.print(table, crop=False)


def _is_numbers(column: Sequence[str]) -> bool:
    return all(_NUMBERS.fullmatch(cell) for cell in column[1:])


def _narrowest(column: Sequence[str]) -> int:
    """The least width of a column, its name first, in which no number and no ordinary word is broken."""
    name, *cells = column
    whole = cells if _is_numbers(column) else [word for cell in cells for word in cell.split()]
    words = [min(cell_len(word), _LONGEST_WORD) for word in name.split()]
    longest = [cell_len(word) if _NUMBERS.fullmatch(word) else min(cell_len(word), _LONGEST_WORD) for word in whole]
    return max([1, *words, *longest])


def _total(widths: Sequence[int]) -> int:
    """The width of a table with its lines and the spaces beside them."""
    return sum(widths) + 3 * len(widths) + 1


def _parts(widest: Sequence[int], narrowest: Sequence[int], room: int) -> list[list[tuple[int, int]]]:
    """Columns by number, with their widths, of tables that each fit into ``room``, as far as a table of two columns can."""
    # The first column names the rows, so it keeps its words whole up to half of the room.
    first = max(narrowest[0], min(widest[0], room // 2 - 4))
    parts: list[list[int]] = [[]]
    for i in range(1, len(widest)):
        if parts[-1] and _total([first, *(narrowest[j] for j in parts[-1]), narrowest[i]]) > room:
            parts.append([])
        parts[-1].append(i)
    fitted = []
    for part in parts:
        chosen = [0, *part]
        widths = [first if len(parts) > 1 else narrowest[0], *(narrowest[i] for i in part)]
        fitted.append(list(zip(chosen, _widened(widths, [widest[i] for i in chosen], room - _total(widths)), strict=True)))
    return fitted


def _widened(widths: Sequence[int], widest: Sequence[int], spare: int) -> list[int]:
    """Widths that share what is to spare: none gets more than it needs, and the rest as evenly as can be."""
    wider = list(widths)
    for left, i in enumerate(sorted(range(len(widths)), key=lambda i: widest[i] - widths[i])):
        more = max(0, min(widest[i] - widths[i], spare // (len(widths) - left)))
        wider[i] += more
        spare -= more
    return wider


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many there are beyond them."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
