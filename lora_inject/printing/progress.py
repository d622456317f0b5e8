"""What takes long is said on standard error: by what moves in a terminal, by lines elsewhere.

A line comes only after some seconds, so that what is quick prints nothing into a file.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

PAUSE = 10.0  # seconds before the first line
T = TypeVar("T")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what is being done while the block runs, of which nothing tells how long it takes.

    Example:
        >>> with doing("reading"):
        ...     pass
    """
    if _moves():
        from rich.console import Console

        with Console(stderr=True).status(f"{what} ..."):
            yield
        return
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, over), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(what: str, over: threading.Event) -> None:
    started, pause = time.monotonic(), PAUSE
    while not over.wait(pause):
        pause = min(2 * pause, 60.0)
        _line(f"{what} ... {time.monotonic() - started:.0f} s")


def tracked(
    items: Iterable[T],
    what: str,
    shown: bool = True,
    *,
    number: int | None = None,
    said: Callable[[T], str] = lambda _: "",
) -> Iterator[T]:
    """The items, and how many of them are over.

    Args:
        items: what takes long to come, or to deal with.
        what: what is done with them.
        shown: False shows nothing.
        number: how many there are; None for their own length, if they have one.
        said: what is said of the last one, beside ``what``.
    """
    number = len(items) if number is None and isinstance(items, Sized) else number
    if not shown:
        yield from items
    elif _moves():
        yield from _under_a_bar(items, what, number, said)
    else:
        yield from _with_lines(items, what, number, said)


def _under_a_bar(
    items: Iterable[T], what: str, number: int | None, said: Callable[[T], str]
) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=number)
        for item in items:
            yield item
            progress.update(task, advance=1, description=what + said(item))


def _with_lines(
    items: Iterable[T], what: str, number: int | None, said: Callable[[T], str]
) -> Iterator[T]:
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last >= PAUSE:
            last = time.monotonic()
            of = "" if number is None else f" of {number:,}"
            _line(f"{what}{said(item)}: {done:,}{of}")


def _moves() -> bool:
    """Whether standard error is a terminal, or a notebook, where a line can be drawn anew."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
