"""PEFT's ``target_modules``: which modules it selects, and what it has to be to select these."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_inject.core.expressions import Expression, Limits
from lora_inject.errors import FormatError

SECONDS, CHARACTERS = 10.0, 100_000  # for the expressions of a file: names of all layers may be one


def target_labels(target_modules: Any) -> tuple[str, ...]:
    """``target_modules`` for people; which layers there are is told by the tensors."""
    if isinstance(target_modules, str):
        return (target_modules,)
    return tuple(map(str, target_modules)) if isinstance(target_modules, list) else ()


def target_names(paths: list[str], modules: Iterable[str] | None) -> list[str] | str:
    """``target_modules`` that select these modules and no others, by PEFT's rule of suffixes."""
    wanted, known = set(paths), set(paths if modules is None else modules)

    def selected(names: Iterable[str]) -> set[str]:
        ends = tuple(f".{name}" for name in names)
        return {path for path in known if path in names or path.endswith(ends)}

    short = sorted({path.rpartition(".")[2] for path in paths})
    if modules is not None and short and selected(short) == wanted:
        return short
    if selected(paths) == wanted:
        return sorted(paths)
    return "|".join(map(re.escape, sorted(paths)))


def expression(text: str, where: Path, limits: Limits | None = None) -> Expression:
    """A regular expression of a file; ``where`` is for errors.

    Raises:
        FormatError: it cannot be used.
    """
    return Expression(text, str(where), FormatError, limits or Limits(SECONDS, CHARACTERS))


def require_targets(config: Mapping[str, Any], paths: Sequence[str], where: Path) -> None:
    """Refuse adapted modules that a config does not select.

    PEFT saves an adapter that it has put on another PEFT model with the other's tensors, and with
    its own config alone, whose scaling is not theirs.

    Raises:
        FormatError: it does not select one of them.
    """
    modules = config.get("target_modules")
    pattern = expression(modules, where) if paths and isinstance(modules, str) else None
    names = list(target_labels(modules)) if isinstance(modules, list) else []
    names += [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
    for path in paths:
        selected = any(f".{path}".endswith(f".{name}") for name in names)
        if pattern is not None:
            selected |= modules == "all-linear" or pattern.matches(path)
        if not selected:
            raise FormatError(
                f"{where}: PEFT put the adapter on top of another one, and {path} is of that one, "
                "whose alpha the file does not say.",
                remedy="Let PEFT merge the one below (merge_and_unload) and train on that, or save "
                "each from a model of its own.",
            )
