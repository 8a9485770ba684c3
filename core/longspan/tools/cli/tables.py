"""Tables for a given width: a grid where it fits, else the last text beneath its row, else a row as a list of facts.

No word is broken and nothing is left out, unless a single word is wider than the whole line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attrs import frozen
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

__all__ = ["Grid", "fit", "render", "wrap"]

GAP = 2
"""Blank columns between two cells."""
ROOM = 30
"""A text that has to be broken gets at least this many columns, or stands beneath its row."""
INDENT = 4
"""How far what stands beneath is set in."""
_BREAKER = Console(width=80, file=None, color_system=None)
"""Text.wrap wants one; only its rules for breaking matter."""

Columns = Sequence[tuple[str, bool]]
Cells = Sequence[str | Text]


def wrap(text: Text, width: int, indent: int = 0) -> list[Text]:
    """Lines of at most `width` columns, broken between words; from the second on set in by `indent`.

    A word wider than a line is broken, as nothing else can be done with it.
    """
    indent = indent if indent < width // 2 else 0
    lines: list[Text] = []
    for paragraph in text.split("\n", allow_blank=True):
        paragraph.expand_tabs(8)
        if cell_len(paragraph.plain) <= width:
            lines.append(paragraph)
            continue
        margin = Text(" " * indent)
        body = paragraph[indent:] if paragraph.plain[:indent].isspace() and indent else paragraph
        wrapped = body.wrap(_BREAKER, max(1, width - indent), overflow="fold")
        lines += [margin + line for line in wrapped]
    for line in lines:
        line.rstrip()
    return lines


@frozen
class Grid:
    """Columns of fixed widths, for rows that come one by one."""

    columns: tuple[tuple[str, bool], ...]
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Of a whole line."""
        return sum(self.widths) + GAP * (len(self.widths) - 1)

    def head(self, rule: str) -> Iterator[Text]:
        """The headings and a line below them."""
        yield from self.row([Text(heading, "bold") for heading, _ in self.columns], bottom=True)
        yield Text(rule * self.width)

    def row(self, cells: Cells, bottom: bool = False) -> Iterator[Text]:
        """The lines of a row; `bottom`: what has fewer lines than its neighbours stands at the bottom."""
        wrapped = [wrap(_text(cell), width) for cell, width in zip(cells, self.widths, strict=True)]
        height = max(map(len, wrapped))
        for number in range(height):
            line = Text()
            cells_of_columns = zip(wrapped, self.columns, self.widths, strict=True)
            for index, (own, (_, is_number), width) in enumerate(cells_of_columns):
                at = number - (height - len(own) if bottom else 0)
                cell = own[at] if 0 <= at < len(own) else Text()
                blank = Text(" " * max(0, width - cell_len(cell.plain)))
                line += Text(" " * GAP * bool(index)) + (blank + cell if is_number else cell + blank)
            line.rstrip()
            yield line


def fit(columns: Columns, rows: Sequence[Cells], width: int) -> Grid | None:
    """A grid of at most this width in which no word is broken and no text is squeezed; None where there is none."""
    wanted, least = [], []
    for index, (heading, is_number) in enumerate(columns):
        texts = [_text(row[index]).plain for row in rows]
        wanted.append(max(map(cell_len, "\n".join([heading, *texts]).split("\n"))))
        words = max(map(cell_len, " ".join([heading, *texts]).split() or [""]))
        least.append(wanted[-1] if is_number else max(words, min(wanted[-1], ROOM)))
    rest = width - GAP * (len(columns) - 1) - sum(least)
    if rest < 0:
        return None
    widths = least
    for index in sorted(range(len(columns)), key=lambda index: wanted[index] - least[index]):
        more = min(rest, wanted[index] - least[index])
        widths[index] += more
        rest -= more
    return Grid(tuple(columns), tuple(widths))


def render(columns: Columns, rows: Sequence[Cells], width: int, rule: str) -> list[Text]:
    """The lines of a table.

    Args:
        columns: of each the heading, and whether it holds numbers.
        rows: as many cells each; a cell may have several lines.
        width: of the terminal.
        rule: what the line below the headings is made of.
    """
    columns = tuple(columns)
    if (grid := fit(columns, rows, width)) is not None:
        return _framed([*grid.head(rule), *(line for row in rows for line in grid.row(row))])
    *others, (_, is_number) = columns
    if others and not is_number and (grid := fit(others, [row[:-1] for row in rows], width)) is not None:
        lines = list(grid.head(rule))
        for row in rows:
            lines += [*grid.row(row[:-1]), *_beneath(row[-1], width)]
        return _framed(lines)
    return _framed([line for row in rows for line in _facts(columns, row, width)])


def _framed(lines: list[Text]) -> list[Text]:
    return [Text(), *lines, Text()]


def _beneath(cell: str | Text, width: int) -> list[Text]:
    text = _text(cell)
    margin = Text(" " * INDENT)
    return [margin + line for line in wrap(text, max(1, width - INDENT))] if text.plain else []


def _facts(columns: Columns, row: Cells, width: int) -> Iterator[Text]:
    """The first cell as a headline, the others packed into lines as `heading value`."""
    yield from wrap(Text.assemble((_text(row[0]).plain, "bold")), width)
    line = Text()
    for (heading, _), cell in zip(columns[1:], row[1:], strict=True):
        value = _text(cell)
        if not value.plain:
            continue
        fact = Text(f"{' '.join(heading.split())} ".lstrip()) + value
        if line.plain and cell_len(line.plain) + 2 * GAP + cell_len(fact.plain) + INDENT > width:
            yield from _beneath(line, width)
            line = Text()
        line = line + Text(" " * GAP) + fact if line.plain else fact
    yield from _beneath(line, width)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
