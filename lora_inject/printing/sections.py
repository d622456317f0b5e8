"""What is shown, apart from where: titled tables, and how they fit a width.

Where a table does not fit, columns that can be spared are left out, then paths are shortened in
their middle, and texts wrapped. A number is never wrapped or cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Styles of rows, as rich names them.
TRAINS, STILL, REFUSED = "green", "dim", "yellow"
_GAP = 3  # characters between two columns
# What is left of a path and of a text while columns can be spared, and of a path at all.
_PATH, _TEXT, _LEAST_PATH = 40, 18, 16


class Column(NamedTuple):
    """What the head of a column says.

    Attributes:
        name: its text.
        number: whether it is aligned to the right and whole in every case.
        path: whether it may be shortened in the middle.
        spare: whether it can be left out.
    """

    name: str
    number: bool
    path: bool
    spare: bool

    @classmethod
    def of(cls, head: str) -> "Column":
        """A column from its head with the marks in front: '?' spare, '>' number, '~' path."""
        name = head.lstrip("?>~")
        marks = head.removesuffix(name)
        return cls(name, ">" in marks, "~" in marks, "?" in marks)


class Section(NamedTuple):
    """A titled table, and lines below it; without columns it is the lines alone.

    Attributes:
        title: above the table.
        columns: their heads, with the marks that ``Column`` knows in front.
        rows: texts, as many in each as there are columns.
        notes: below the table.
        styles: of the rows, ``TRAINS``, ``STILL``, ``REFUSED`` or "", or of the notes where there
            are no rows; those that are missing have none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    styles: Sequence[str] = ()

    def style(self, i: int) -> str:
        """The style of a row."""
        return self.styles[i] if i < len(self.styles) else ""


def fitted(section: Section, width: int) -> tuple[list[Column], list[list[str]]]:
    """The columns and rows of a section that fit a width, as well as they can."""
    columns, rows = [Column.of(head) for head in section.columns], [list(r) for r in section.rows]
    while True:
        cells = zip([column.name for column in columns], *rows, strict=True)
        longest = [max(map(len, column)) for column in cells]
        least = [
            length if c.number else min(length, _PATH if c.path else _TEXT)
            for c, length in zip(columns, longest, strict=True)
        ]
        missing = sum(least) + _GAP * len(columns) - 1 - width
        spare = [i for i, column in enumerate(columns) if column.spare]
        if missing <= 0 or not spare:
            break
        del columns[spare[-1]]
        for row in rows:
            del row[spare[-1]]
    for i, column in enumerate(columns):
        if column.path:
            room = max(min(longest[i], _LEAST_PATH), min(longest[i], least[i] - missing))
            missing += room - least[i]
            for row in rows:
                row[i] = shortened(row[i], room)
    return columns, rows


def shortened(path: str, room: int) -> str:
    """A path without its middle where it is longer than there is room for; its end says most."""
    if len(path) <= room:
        return path
    head = (room - 3) // 3
    return f"{path[:head]}...{path[head + 3 - room :]}"
