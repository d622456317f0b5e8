"""Eval mode for the length of a block, module by module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules be in eval mode, and afterwards in the mode that each had."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False  # and not .eval(), which a model may have a method for
        yield
    finally:
        for module, training in modes:
            module.training = training
