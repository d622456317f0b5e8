"""Tables and progress for people, by rich: tables as text, and as HTML in a notebook."""

import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH = 120
T = TypeVar("T")


class Section(NamedTuple):
    """A titled table, and lines below it; columns whose name starts with '>' are right-aligned.

    Without columns it is the lines alone.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def renderable(self) -> "RenderableType":
        """The section as rich draws it."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title, notes = Text(self.title), map(Text, self.notes)
        if not self.columns:
            return Group(title, "", *notes)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in self.columns:
            table.add_column(
                Text(column.removeprefix(">")),
                justify="right" if column.startswith(">") else "left",
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(title, table, *notes)


class Tables(NamedTuple):
    """Several sections, one under the other."""

    sections: Sequence[Section]

    def text(self) -> str:
        """Plain text, with ASCII lines where standard output cannot show others."""
        out = _Buffer()
        self._print(_console(out))
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def html(self) -> str:
        """The same as HTML with its styles inline."""
        console = _console(StringIO(), record=True)
        self._print(console)
        return console.export_html(
            inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>'
        )

    def _print(self, console: "Console") -> None:
        glued = False  # a table ends in an empty line, and the lines below one do not
        for section in self.sections:
            if glued:
                console.print()
            console.print(section.renderable())
            glued = bool(section.notes)


class Shown:
    """A result that ``print`` and notebooks show as tables."""

    def _tables(self) -> Tables:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._tables().text()

    def _repr_html_(self) -> str:
        return self._tables().html()


class _Buffer(StringIO):
    """Text with the encoding of standard output, which rich asks for before it draws lines."""

    encoding = property(lambda _: getattr(sys.stdout, "encoding", None) or "utf-8")


def _console(out: StringIO, record: bool = False) -> "Console":
    from rich.console import Console

    return Console(file=out, width=WIDTH, record=record, color_system=None, highlight=False)


def count(number: int) -> str:
    """An integer with thousands separators."""
    return f"{number:,}"


def size(n_bytes: float) -> str:
    """Bytes in decimal units: 2_359_296 is '2.36 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.2f} TB"


def plural(number: int, noun: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def tracked(items: Iterable[T], what: str, shown: bool) -> Iterator[T]:
    """The items under a progress bar on standard error, which goes when they are over."""
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    number = float(len(items)) if isinstance(items, Sized) else None
    yield from track(items, what, number, console=Console(stderr=True), transient=True)
