"""The ways in which dropout may be computed: as ours chooses by itself, and as it is forced to."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from lora_inject.arithmetic.masks import KERNELS

Context = Callable[[], AbstractContextManager[object]]


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Give an environment variable a value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


WAYS: dict[str, Context] = {"ours": nullcontext}  # each is entered before ours is timed
WAYS_OF_DROPOUT: dict[str, Context] = {
    **WAYS,
    "ours with Triton": partial(environment, KERNELS, "triton"),
    "ours with torch": partial(environment, KERNELS, "torch"),
}
