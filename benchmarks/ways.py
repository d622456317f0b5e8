"""The ways in which ours may run: as it chooses by itself, and as something forces it to.

A row times ours once for each name of WAYS, each within its context, which is not timed::

    WAYS["ours, triton"] = partial(environment, "LORA_INJECT_KERNELS", "triton", refresh)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {"ours": nullcontext}


@contextmanager
def environment(
    name: str, value: str, refresh: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Give an environment variable a value, and let who has read it read it again."""
    before = os.environ.get(name)
    os.environ[name] = value
    refresh()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        refresh()
