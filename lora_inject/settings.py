"""The arguments of ``inject``: every value is checked here, before a model is looked at."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import regex
import torch

from lora_inject.errors import ArgumentError

BiasMode = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class Settings:
    """Rank, alpha and dropout of one adapter on one layer."""

    r: int
    alpha: float
    dropout: float

    @property
    def scaling(self) -> float:
        """The factor of B A x: alpha / r (LoRA, arXiv 2106.09685, section 4.1)."""
        return self.alpha / self.r


def settings(
    r: Any, alpha: Any, dropout: Any, override: Mapping[str, Any] | None = None, where: str = ""
) -> Settings:
    """Check rank, alpha and dropout, with the overrides of one pattern.

    A pattern that sets ``r`` and not ``alpha`` gets the call's alpha, or its own r where the call
    leaves alpha at its default.

    Raises:
        ArgumentError: a value is out of range, or the override has an unknown key.
    """
    values = {"r": r, "alpha": alpha, "dropout": dropout}
    if override is not None:
        if not isinstance(override, Mapping):
            raise ArgumentError(
                f"{where} must be a mapping such as {{'r': 8}}, not {override!r}.",
                remedy="Its keys are r, alpha and dropout.",
            )
        for key in override:
            if key not in values:
                raise ArgumentError(f"{where} has the unknown key {key!r}; known: {list(values)}.")
        values |= override
    named = {key: f"{key} in {where}" if override and key in override else key for key in values}
    rank = check_rank(values["r"], named["r"])
    return Settings(
        r=rank,
        alpha=float(rank)
        if values["alpha"] is None
        else check_alpha(values["alpha"], named["alpha"]),
        dropout=check_dropout(values["dropout"], named["dropout"]),
    )


def check_rank(r: Any, name: str) -> int:
    """A rank is an integer of at least 1."""
    try:
        rank = operator.index(r)
    except TypeError:
        rank = 0
    if isinstance(r, bool) or rank < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, not {r!r}.")
    return rank


def check_alpha(alpha: Any, name: str) -> float:
    """Alpha is a finite number above zero: zero or less would switch the adapter off or flip it."""
    if not _is_number(alpha) or not (0 < alpha < math.inf):
        raise ArgumentError(
            f"{name} must be a finite number above 0, not {alpha!r}.",
            remedy="Leave it out for alpha = r.",
        )
    return float(alpha)


def check_dropout(dropout: Any, name: str) -> float:
    """Dropout is a probability below 1."""
    if not _is_number(dropout) or not (0 <= dropout < 1):
        raise ArgumentError(f"{name} must be a number in [0, 1), not {dropout!r}.")
    return float(dropout)


def check_bias(bias: Any) -> BiasMode:
    """A bias mode is one of loralib's three."""
    for mode in get_args(BiasMode):
        if bias == mode:
            return mode  # type: ignore[no-any-return]
    raise ArgumentError(f"bias must be one of {list(get_args(BiasMode))}, not {bias!r}.")


def check_dtype(dtype: Any) -> torch.dtype | Literal["base"] | None:
    """An adapter dtype is None, "base" or a floating-point dtype that can be trained."""
    if dtype is None or dtype == "base":
        return dtype  # type: ignore[no-any-return]
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    raise ArgumentError(
        f'dtype must be None, "base" or a floating-point torch.dtype of 16 bits or more, '
        f"not {dtype!r}."
    )


def check_seed(seed: Any) -> int | None:
    """A seed is an integer of 0 up to 2**63 - 1, or None."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed must be an integer in [0, 2**63), not {seed!r}.")
    return seed


def check_adapter(name: Any) -> str:
    """An adapter's name becomes part of a parameter's name: letters, digits and underscores."""
    if not isinstance(name, str) or not regex.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ArgumentError(
            f"adapter must be a name of letters, digits and underscores, not {name!r}."
        )
    return name


def check_layers(layers: Any) -> tuple[int, ...] | None:
    """Block indices: an integer, or some of them; negative ones count from the last block."""
    if layers is None:
        return None
    wanted = layers if isinstance(layers, Iterable) else [layers]
    indices = tuple(dict.fromkeys(wanted))
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise ArgumentError(
            f"layers must be an integer or several (a list, a range), not {layers!r}."
        )
    return indices


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
