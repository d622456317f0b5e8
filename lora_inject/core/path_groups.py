"""Many paths as few: those that differ in numbers alone become one, 'layers.{0..31}.mlp'."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lora_inject.core.patterns import braces

T = TypeVar("T")


def grouped(
    items: Iterable[T], path: Callable[[T], str], alike: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Items by one path for all of them whose paths differ in numbers alone, in their order.

    Args:
        items: what has a path.
        path: the path of one.
        alike: what has to be equal besides.
    """
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        template = tuple(None if part.isdecimal() else part for part in path(item).split("."))
        groups.setdefault((template, alike(item)), []).append(item)
    return [(_common([path(item) for item in group]), group) for group in groups.values()]


def _common(paths: Sequence[str]) -> str:
    columns = zip(*(path.split(".") for path in paths), strict=True)
    merged = [c[0] if len(set(c)) == 1 else braces(map(int, set(c))) for c in columns]
    return ".".join(merged) or "(the model itself)"


def natural(path: str) -> list[tuple[int, str]]:
    """What sorts paths as people do: block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
