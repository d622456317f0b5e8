"""The arguments of ``inject``: every value is checked here, before a model is looked at."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from lora_inject.arithmetic.thinning import Drops
from lora_inject.errors import ArgumentError
from lora_inject.starts import STARTS, Custom, Start
from lora_inject.variants import FIXED, SCALINGS, VARIANTS, Variant

BiasMode = Literal["none", "all", "lora_only"]
How = Literal["auto", "weight"]
Layout = Literal["out_in", "in_out"]
BASE = "base"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Parts = tuple[tuple[str | None, int | None], ...]


@dataclass(frozen=True)
class Settings:
    """How one layer is adapted.

    Attributes:
        r: rank.
        alpha: the delta is scaled by alpha / r.
        dropout: probability on the adapter's input.
        drops: probabilities of leaving out ranks, or the adapter, for one call in training.
        how: "auto", or "weight" to adapt what the layer reads and not what it returns.
        layout: the order of the last two dimensions of a fused weight, if the user says it.
        parts: (name, size) of each part of a fused projection; None for what stays as it is.
        variant: what A and B are to the weight.
        start: where A and B begin.
    """

    r: int
    alpha: float
    dropout: float
    how: How = "auto"
    layout: Layout | None = None
    parts: Parts = ()
    variant: Variant = field(default_factory=Variant)
    start: Start = field(default_factory=Start)
    drops: Drops = field(default_factory=Drops)

    @property
    def scaling(self) -> float:
        """The factor of B A x: alpha / r (LoRA, arXiv 2106.09685, section 4.1), or as rsLoRA."""
        return self.variant.scaling.factor(self.alpha, self.r)

    def part_sizes(self, n_out: int) -> list[tuple[str | None, int]]:
        """The parts with their sizes; equal ones where no sizes are given.

        Raises:
            ArgumentError: they do not add up to the layer's output features.
        """
        sizes = [size for _, size in self.parts]
        known = sum(size for size in sizes if size is not None)
        open_parts = sizes.count(None)
        each, rest = divmod(n_out - known, open_parts) if open_parts else (0, n_out - known)
        if rest or each < 0 or (open_parts and not each) or (open_parts and known):
            names = [name for name, _ in self.parts]
            raise ArgumentError(
                f"parts {names} do not divide {n_out} output features.",
                remedy="Give every part its size: (('q', 64), (None, 32), ('v', 32)).",
            )
        return [(name, each if size is None else size) for name, size in self.parts]


def settings(values: Mapping[str, Any], override: Any = None, where: str = "") -> Settings:
    """Check r, alpha and the like, with the overrides of one pattern.

    A pattern that sets ``r`` and not ``alpha`` gets the call's alpha, or its own r where the call
    leaves alpha at its default.

    Raises:
        ArgumentError: a value is out of range, or the override has an unknown key.
    """
    own = {} if override is None else override
    if not isinstance(own, Mapping):
        raise ArgumentError(
            f"{where} must be a mapping such as {{'r': 8}}, not {own!r}.",
            remedy=f"Its keys are {', '.join(values)}.",
        )
    for key in own:
        if key not in values:
            raise ArgumentError(f"{where} has the unknown key {key!r}; known: {list(values)}.")
    v = {**values, **own}
    names = {key: f"{key} in {where}" if key in own else key for key in values}
    rank, start = check_count(v["r"], names["r"]), check_start(v["init"], names["init"])
    dropout, drops = check_dropouts(v["dropout"], names["dropout"])
    return Settings(
        r=rank,
        alpha=float(rank) if v["alpha"] is None else check_alpha(v["alpha"], names["alpha"]),
        dropout=dropout,
        drops=drops,
        how=check_choice(v["how"], names["how"], How),
        layout=None if v["layout"] is None else check_choice(v["layout"], names["layout"], Layout),
        variant=_variant(v, names, start),
        start=start,
    )


def _variant(values: Mapping[str, Any], names: Mapping[str, str], start: Start) -> Variant:
    fixed = values["fixed"]
    fixed = start.fixed if fixed is None else check_word(fixed, names["fixed"], FIXED)
    variant = values["variant"]
    if not isinstance(variant, Variant):
        variant = VARIANTS[check_word(variant, names["variant"], VARIANTS)]()
    return replace(
        variant,
        scaling=SCALINGS[check_word(values["scaling"], names["scaling"], SCALINGS)],
        fixed=fixed,
        offset=start.offset,
    )


def check_start(start: Any, name: str) -> Start:
    """A start is one of the words, an object of ``lora_inject.starts``, or a function."""
    if isinstance(start, Start):
        return start
    if callable(start) and not isinstance(start, type):
        return Custom(start)
    return STARTS[check_word(start, name, STARTS)]()


def check_choice(value: Any, name: str, choices: Any) -> Any:
    """One of the words of a Literal."""
    return check_word(value, name, get_args(choices))


def check_word(value: Any, name: str, words: Iterable[str]) -> Any:
    """One of these words."""
    if not isinstance(value, str) or value not in words:
        raise ArgumentError(f"{name} must be one of {list(words)}, not {value!r}.")
    return value


def check_parts(parts: Any) -> dict[Any, Parts]:
    """A mapping of patterns to the parts of the layers that they select."""
    if not isinstance(parts, Mapping):
        raise ArgumentError(f"parts must be a mapping such as {_PARTS_EXAMPLE}, not {parts!r}.")
    return {pattern: _check_part_list(value, pattern) for pattern, value in parts.items()}


_PARTS_EXAMPLE = "{'c_attn': ('q', None, 'v')}"


def _check_part_list(value: Any, pattern: Any) -> Parts:
    problem = ArgumentError(
        f"parts[{pattern!r}] must be a tuple of names, None, or (name, size), not {value!r}.",
        remedy=f"Such as {_PARTS_EXAMPLE}; names are identifiers, each used once.",
    )
    if not isinstance(value, tuple | list) or not value:
        raise problem
    parts: list[tuple[str | None, int | None]] = []
    for item in value:
        name, size = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        named = isinstance(name, str) and name.isidentifier()
        number = None if size is None else _integer(size)
        sized = size is None or (number is not None and number > 0)
        if not (name is None or named) or not sized:
            raise problem
        parts.append((name, number))
    names = [name for name, _ in parts if name is not None]
    if not names or len(set(names)) < len(names):
        raise problem
    return tuple(parts)


def check_count(r: Any, name: str) -> int:
    """A rank is an integer of at least 1."""
    rank = _integer(r)
    if rank is None or not 1 <= rank < 2**31:
        raise ArgumentError(f"{name} must be an integer from 1 to {2**31 - 1:,}, not {r!r}.")
    return rank


def check_alpha(alpha: Any, name: str) -> float:
    """Alpha is a finite number above zero: zero or less would switch the adapter off or flip it."""
    if not _is_number(alpha) or not (0 < alpha < math.inf):
        raise ArgumentError(
            f"{name} must be a finite number above 0, not {alpha!r}.",
            remedy="Leave it out for alpha = r.",
        )
    return float(alpha)


def check_dropouts(dropout: Any, name: str) -> tuple[float, Drops]:
    """The probability on the input, and those of leaving out ranks and whole adapters."""
    if not isinstance(dropout, Mapping):
        return check_dropout(dropout, name), Drops()
    if not dropout.keys() <= {"input", "rank", "module"}:
        raise ArgumentError(
            f"{name} must be a number or a mapping with input, rank and module, not {dropout!r}.",
            remedy='Such as {"input": 0.1, "rank": 0.1, "module": 0.05}.',
        )
    each = [check_dropout(dropout.get(key, 0), name) for key in ("input", "rank", "module")]
    return each[0], Drops(*each[1:])


def check_dropout(dropout: Any, name: str) -> float:
    """Dropout is a probability below 1."""
    if not _is_number(dropout) or not (0 <= dropout < 1):
        raise ArgumentError(f"{name} must be a number in [0, 1), not {dropout!r}.")
    return float(dropout)


def check_bias(bias: Any) -> BiasMode:
    """A bias mode is one of loralib's three."""
    return check_choice(bias, "bias", BiasMode)  # type: ignore[no-any-return]


def check_dtype(dtype: Any) -> torch.dtype | Literal["base"] | None:
    """An adapter dtype is None, "base" or a floating-point dtype that can be trained."""
    if dtype is None or dtype == "base":
        return dtype  # type: ignore[no-any-return]
    given = DTYPES.get(dtype) or getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(given, torch.dtype) and given.is_floating_point and given.itemsize > 1:
        return given
    raise ArgumentError(
        'dtype must be None, "base" or a floating-point dtype of 16 bits or more, as torch.float16 '
        f'or "bf16", not {dtype!r}.'
    )


def check_seed(seed: Any) -> int | None:
    """A seed is an integer of 0 up to 2**63 - 1, or None."""
    if seed is None:
        return None
    number = _integer(seed)
    if number is None or not 0 <= number < 2**63:
        raise ArgumentError(f"seed must be an integer in [0, 2**63), not {seed!r}.")
    return number


def check_adapter(name: Any) -> str:
    """An adapter's name becomes part of a parameter's name: letters, digits and underscores."""
    if not (isinstance(name, str) and name.isascii() and name.replace("_", "a").isalnum()):
        raise ArgumentError(
            f"adapter must be a name of letters, digits and underscores, not {name!r}."
        )
    if name == BASE:
        raise ArgumentError(f"adapter must not be {BASE!r}, which is the model without adapters.")
    return name


def check_names(names: Any, argument: str) -> tuple[str, ...]:
    """Names of adapters: one, or several, each once."""
    wanted = [names] if isinstance(names, str) else names
    known = list(wanted) if isinstance(wanted, Iterable) else [None]
    if not all(isinstance(name, str) for name in known):
        raise ArgumentError(f"{argument} must be a name or several, not {names!r}.")
    return tuple(dict.fromkeys(map(str, known)))


def check_weights(weights: Any) -> dict[str, float]:
    """Weights of adapters, finite numbers by name."""
    if not isinstance(weights, Mapping):
        raise ArgumentError(f'adapters must be a mapping such as {{"fr": 0.7}}, not {weights!r}.')
    for name, weight in weights.items():
        if not _is_number(weight) or not abs(weight) < 1e30:
            raise ArgumentError(f"the weight of {name!r} must be a finite number, not {weight!r}.")
    return {name: float(weight) for name, weight in weights.items()}


def check_layers(layers: Any) -> tuple[int, ...] | None:
    """Block indices: an integer, or some of them; negative ones count from the last block."""
    if layers is None:
        return None
    wanted = layers if isinstance(layers, Iterable) else [layers]
    indices = [_integer(index) for index in wanted]
    known = tuple(index for index in indices if index is not None)
    if not known or len(known) < len(indices):
        raise ArgumentError(
            f"layers must be an integer or several (a list, a range), not {layers!r}."
        )
    return known


def _is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or of a library such as numpy."""
    small = isinstance(value, Real) and (not isinstance(value, Integral) or abs(int(value)) < 2**63)
    return small and not isinstance(value, bool)


def _integer(value: Any) -> int | None:
    """An integer of Python or of a library such as numpy; None of anything else."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        return None if is_bool else operator.index(value)
    except TypeError:
        return None
