"""Numbers for people, and how many of something there are."""

from collections.abc import Sequence


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


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are: 'a, b, c and 2 more'."""
    more = f" and {len(names) - most:,} more" if names[most:] else ""
    return f"{', '.join(names[:most])}{more}"
