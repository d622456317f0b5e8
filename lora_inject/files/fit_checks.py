"""Values that are not what a place wants: named, counted and refused."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import is_plain, is_usable


def require_fit(
    what: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]
) -> None:
    """Refuse values that are not exactly those wanted, by name and shape, or not finite.

    Raises:
        FormatError: they are not, with counts and examples of each problem.
    """
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    raise_problems(
        what,
        {
            "missing": [key for key in wanted if key not in given],
            "unexpected": [key for key in given if key not in wanted],
            "of another shape": [
                f"{key} {shapes[key]}, not {shape}"
                for key, shape in wanted.items()
                if key in given and shapes[key] != shape
            ],
            "not finite": not_finite(given),
        },
    )


def raise_problems(what: str, problems: Mapping[str, Iterable[str]]) -> None:
    """One error for everything that is wrong with values, with counts and examples.

    Raises:
        FormatError: there is a problem.
    """
    lists = {problem: list(names) for problem, names in problems.items()}
    texts = [
        f"{len(names):,} {problem} ({', '.join(name[:200] for name in names[:3])}"
        + (", ...)" if names[3:] else ")")
        for problem, names in lists.items()
        if names
    ]
    if texts:
        raise FormatError(f"{what}: {'; '.join(texts)}.", remedy="Nothing was loaded.")


def is_for(value: Any, place: Tensor | None) -> bool:
    """Whether a value is a tensor with numbers of the kind that a place wants, A and B floating."""
    if not isinstance(value, Tensor):
        return False
    if place is not None and (value.is_complex() or place.is_complex()):
        return value.is_complex() and place.is_complex() and is_plain(value)
    return is_usable(value, floating=place is None or place.is_floating_point())


def require_usable(values: Mapping[str, Any], places: Mapping[str, Tensor]) -> None:
    """Refuse values that are not tensors of the kind that their places want.

    Raises:
        FormatError: there are such, by name.
    """
    wrong = [key for key, value in values.items() if not is_for(value, places.get(key))]
    arrays = [key for key in wrong if type(values[key]).__name__ == "ndarray"]
    raise_problems(
        "some values cannot be used",
        {
            "numpy arrays, of which torch.from_numpy makes tensors": arrays,
            "no plain tensors": [key for key in wrong if key not in arrays],
        },
    )


def not_finite(tensors: Mapping[Any, Tensor]) -> list[Any]:
    """The keys of those that hold NaN or infinity."""
    floating = {k: t for k, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    if not floating:
        return []
    # One norm of each, all in one call; only where it is not finite every element is looked at.
    norms = torch.stack([norm.float().cpu() for norm in torch._foreach_norm([*floating.values()])])
    fine = norms.isfinite().tolist()
    doubtful = [key for key, is_fine in zip(floating, fine, strict=True) if not is_fine]
    return [key for key in doubtful if not floating[key].isfinite().all()]
