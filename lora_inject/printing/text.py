"""Sections as text, drawn by rich."""

import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from lora_inject.printing.sections import Section, fitted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 120  # at most, and where there is no terminal


def width() -> int:
    """How wide tables are: as the terminal, or as the environment's COLUMNS says."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def as_text(sections: Sequence[Section]) -> str:
    """Plain text, with ASCII lines where standard output cannot show others."""
    from rich.console import Console

    console = Console(file=_Buffer(), width=width(), color_system=None, highlight=False)
    return _drawn(console, sections)


def print_in_colour(sections: Sequence[Section]) -> None:
    """Print sections to standard output, in the colours that it has."""
    from rich.console import Console

    print(_drawn(Console(width=width(), highlight=False), sections))


def _drawn(console: "Console", sections: Sequence[Section]) -> str:
    """The sections with one empty line between them, and none of rich's own around."""
    texts = []
    for section in sections:
        with console.capture() as captured:
            for part in _parts(section, console.width):
                console.print(part)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        texts.append("\n".join(lines).strip("\n"))
    return "\n\n".join(texts)


def _parts(section: Section, room: int) -> "list[RenderableType]":
    from rich.text import Text

    parts: list[RenderableType] = [Text(section.title, style="bold")]
    parts.append(_table(section, room) if section.columns else "")
    if len(section.notes) == 1:
        parts.append(Text(section.notes[0], style="" if section.rows else section.style(0)))
    elif section.notes:
        parts.append(_listed(section))
    return parts


def _table(section: Section, room: int) -> "RenderableType":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, rows = fitted(section, room)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            Text(column.name),
            justify="right" if column.number else "left",
            no_wrap=column.number or column.path,
            overflow="fold",
        )
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), style=section.style(i))
    return table


def _listed(section: Section) -> "RenderableType":
    """The notes as a list, whose lines after the first are indented."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for i, note in enumerate(section.notes):
        grid.add_row("-", Text(note), style="" if section.rows else section.style(i))
    return grid


class _Buffer(StringIO):
    """Text with the encoding of standard output, which rich asks for before it draws lines."""

    encoding = property(lambda _: getattr(sys.stdout, "encoding", None) or "utf-8")
