"""What a call of ``plan`` or ``inject`` asks for, checked as far as it can be without a model."""

import operator
from collections.abc import Mapping, Sized
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_inject import settings as check
from lora_inject.core.hints import require_no_config
from lora_inject.core.patterns import Pattern, parse
from lora_inject.errors import ArgumentError
from lora_inject.kinds import find_kind
from lora_inject.settings import BiasMode, Parts, Settings
from lora_inject.variants import Rows

ALL_LINEAR = "all-linear"
_DEFAULTS = {
    "r": 8, "alpha": None, "dropout": 0.0, "scaling": "lora", "variant": "lora",
    "init": "default", "fixed": None, "how": "auto", "layout": None,
}  # fmt: skip


class Request(NamedTuple):
    """The arguments of ``plan``, as patterns and checked values.

    Attributes:
        settings: the patterns of the targets, in their order, with the settings of each.
        rows: the same of tables of which some rows train.
        excluded: what to leave alone.
        train_also: what trains in full.
        parts: the parts of fused projections.
        layers: block indices to keep; None for all.
        dtype: of A and B: a dtype, "base", or None to follow the base.
        seed: the seed of the starting values; None draws one.
        adapter: the adapter's name.
        bias: the bias mode.
        dropout_can_go: whether layers that are adapted in their weight, where dropout has nothing
            to act on, do without it, and are not refused.
    """

    settings: Mapping[Pattern, Settings]
    rows: Mapping[Pattern, Settings] = {}
    excluded: tuple[Pattern, ...] = ()
    train_also: tuple[Pattern, ...] = ()
    parts: Mapping[Pattern, Parts] = {}
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype | str | None = None
    seed: int | None = None
    adapter: str = "default"
    bias: BiasMode = "none"
    dropout_can_go: bool = False


def settings_by_pattern(targets: Any, values: Mapping[str, Any]) -> dict[Pattern, Settings]:
    """The patterns of the targets with the settings of each.

    Args:
        targets: as the user wrote them; none where rows are all that trains.
        values: those of the call by the names of ``_DEFAULTS``, where they are not the usual ones;
            a pattern's own overrule them.

    Raises:
        ArgumentError: a pattern or a value cannot be used.
    """
    require_no_config(targets)
    values = {**_DEFAULTS, **values}
    default = check.settings(values)
    return {
        pattern: default
        if pattern.settings is None
        else check.settings(values, pattern.settings, f"targets[{pattern.label!r}]")
        for pattern in parse(targets, "targets", _WORDS, with_settings=True)
    }


def rows_by_pattern(rows: Any) -> dict[Pattern, Settings]:
    """The patterns of ``rows`` with the settings of each.

    Raises:
        ArgumentError: it is no mapping, or a pattern or an id cannot be used.
    """
    if not is_given(rows):
        return {}
    if not isinstance(rows, Mapping):
        raise ArgumentError(
            f"rows must be a mapping of names to ids, not {rows!r:.200}.",
            remedy='Such as rows={"embed_tokens": [32000, 32001]}.',
        )
    return {
        pattern: row_settings(pattern.settings, f"rows[{pattern.label!r}]")
        for pattern in parse(rows, "rows", with_settings=True)
    }


def row_settings(ids: Any, where: str) -> Settings:
    """The settings of rows of a table that train, by their ids.

    Raises:
        ArgumentError: they are no ids, or one stands there twice.
    """
    try:
        known = sorted(-1 if isinstance(i, bool) else operator.index(i) for i in ids)
    except TypeError:
        known = []
    twice = next((i for i, j in pairwise(known) if i == j), None)
    if not known or not 0 <= known[0] <= known[-1] < 2**31 or twice is not None:
        wrong = f"{ids!r:.200}" if twice is None else f"some with {twice} in it twice"
        raise ArgumentError(
            f"{where} must be ids of rows, from 0 on and each once, not {wrong}.",
            remedy='Such as rows={"embed_tokens": [32000, 32001]}.',
        )
    n = len(known)
    return Settings(r=n, alpha=float(n), dropout=0.0, variant=Rows(ids=tuple(known)))


def optional_patterns(given: Any, argument: str) -> tuple[Pattern, ...]:
    """The patterns of an argument that may be left out.

    Raises:
        ArgumentError: one of them cannot be used.
    """
    words = _WORDS if argument == "exclude" else {}
    return parse(given, argument, words) if is_given(given) else ()


def parts_by_pattern(parts: Any) -> dict[Pattern, Parts]:
    """The patterns of ``parts`` with the parts of the layers that they select.

    Raises:
        ArgumentError: one of them cannot be used.
    """
    given = check.check_parts(parts) if is_given(parts) else {}
    return {parse(key, "parts")[0]: value for key, value in given.items()}


def is_given(patterns: Any) -> bool:
    """Whether an optional argument of patterns holds any."""
    return not (patterns is None or (isinstance(patterns, Sized) and len(patterns) == 0))


def is_linear_like(path: str, module: nn.Module) -> bool:
    """The test behind ``"all-linear"``, before output heads are left out."""
    kind = find_kind(module)
    return kind is not None and kind.linear_like


_WORDS = {ALL_LINEAR: is_linear_like}
