"""PEFT's ``rank_pattern`` and ``alpha_pattern``: the value of each layer, by regular expressions.

An expression that is a name, as this library and diffusers write them, is looked up, so that a file
with a rank for every layer costs one look for each.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_inject.core.expressions import Limits
from lora_inject.files.formats.peft_targets import expression


class Patterns:
    """Values by expressions, of which the first that matches says the value.

    Args:
        values: by expression, which stands for the end of a path, from a component on.
        where: the file, for errors.
        limits: of the expressions.

    Raises:
        FormatError: an expression cannot be used.
    """

    def __init__(self, values: Mapping[str, Any], where: Path, limits: Limits) -> None:
        self.values = list(values.values())
        self.names, self.others = dict[tuple[bool, str], int](), {}
        for i, text in enumerate(values):
            is_whole = text.startswith("^")
            name = re.sub(r"\\(.)", r"\1", text[is_whole:])
            if re.escape(name) == text[is_whole:]:
                self.names[is_whole, name] = i
            else:
                self.others[i] = expression(rf"(.*\.)?({text})", where, limits)

    def find(self, path: str, default: Any) -> Any:
        """The value of the layer at a path."""
        first = min((self.names[name] for name in _names(path) if name in self.names), default=None)
        for i, pattern in self.others.items():
            if first is not None and first < i:
                break
            if pattern.matches(path):
                return self.values[i]
        return default if first is None else self.values[first]


def _names(path: str) -> Iterator[tuple[bool, str]]:
    """The names that select a path: whether all of it, and the name; else its end."""
    yield True, path
    while path:
        yield False, path
        path = path.partition(".")[2]
