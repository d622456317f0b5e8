"""Results for people: tables as text, in colour where a terminal has it, and as HTML; progress."""

from collections.abc import Sequence
from typing import NamedTuple

from lora_inject.printing.html import as_html
from lora_inject.printing.numbers import count, few, plural, size
from lora_inject.printing.sections import REFUSED, STILL, TRAINS, Section
from lora_inject.printing.text import as_text, print_in_colour

__all__ = [
    "REFUSED",
    "STILL",
    "TRAINS",
    "Section",
    "Shown",
    "Tables",
    "count",
    "few",
    "plural",
    "show",
    "size",
]


class Tables(NamedTuple):
    """Several sections, one under the other."""

    sections: Sequence[Section]

    def text(self) -> str:
        """Plain text, as wide as the terminal, with ASCII lines where it cannot show others."""
        return as_text(self.sections)

    def html(self) -> str:
        """The same as HTML tables."""
        return as_html(self.sections)


class Shown:
    """A result that ``print`` and notebooks show as tables, and the interpreter as one line."""

    def _tables(self) -> Tables:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._tables().text()

    def __repr__(self) -> str:
        name, title = type(self).__name__, self._tables().sections[0].title.splitlines()[0]
        return f"<{name}: {title.removeprefix(f'{name}: ')}>"

    def _repr_html_(self) -> str:
        return self._tables().html()


def show(*results: Shown) -> None:
    """Print results one under the other, in colour where standard output is a terminal."""
    print_in_colour([section for result in results for section in result._tables().sections])
