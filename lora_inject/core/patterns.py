"""Patterns to modules: the whole grammar of ``targets``, ``exclude`` and ``train_also``.

Knows nothing of LoRA. A module that is registered under several names is one ``NamedModule`` with
several paths, and a pattern selects it by any of them.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from lora_inject.core.expressions import Expression, Limits
from lora_inject.errors import ArgumentError

Predicate = Callable[[str, nn.Module], bool]


# What a user may write.
PatternLike = str | re.Pattern[str] | type[nn.Module] | Predicate
Patterns = PatternLike | Iterable[PatternLike]
Targets = Patterns | Mapping[Any, Mapping[str, Any]]


class NamedModule(NamedTuple):
    """One module and every path that leads to it, the first in registration order first."""

    module: nn.Module
    paths: tuple[str, ...]

    @property
    def path(self) -> str:
        """The module's first name; what reports and seeds use."""
        return self.paths[0]


@dataclass(frozen=True, eq=False)
class Pattern:
    """One selector as the user wrote it: ``label`` for messages, ``test`` to decide.

    ``by_name`` tells that the test reads the path alone, so that it can also be asked about the
    paths of parameters; ``wide`` that it is a glob or a regular expression. ``last`` is the last
    component of every path that it matches, where that is known. ``settings`` are the pattern's
    own, where a mapping gives them.
    """

    label: str
    test: Predicate = field(repr=False)
    by_name: bool = False
    wide: bool = False
    last: str | None = None
    settings: Any = None

    def selects(self, named: NamedModule) -> bool:
        """Whether the pattern matches any of the module's names."""
        return any(self.test(path, named.module) for path in named.paths)

    def names(self, path: str) -> bool:
        """Whether a pattern that reads the path alone matches it."""
        return self.test(path, _NOTHING)


_NOTHING = nn.Identity()


def parse(
    spec: Any,
    argument: str,
    keywords: Mapping[str, Predicate] | None = None,
    *,
    with_settings: bool = False,
) -> tuple[Pattern, ...]:
    """Turn what the user wrote into patterns.

    The grammar: a plain string matches whole name components from the right (``"q_proj"``,
    ``"self_attn.q_proj"``); a string with ``*``, ``?`` or ``[`` is a glob over the whole path, in
    which ``*`` also crosses dots; ``"re:..."`` is a regular expression that must match the whole
    path; a module class selects its instances; a callable ``(path, module) -> bool`` selects what
    it returns true for; a mapping gives each of its patterns settings of its own; a list holds
    several.

    Args:
        spec: one of the above.
        argument: the argument's name, for messages.
        keywords: words with a meaning of their own (``"all-linear"``) and their tests.
        with_settings: whether a mapping may give patterns settings of their own.

    Raises:
        ArgumentError: the value is empty, of another type, or a regular expression that does not
            compile.
    """
    if isinstance(spec, Mapping):
        if not with_settings:
            raise ArgumentError(f"{argument} takes patterns without settings, not a mapping.")
        pairs = [(item, f"{argument}[{item!r}]", value) for item, value in spec.items()]
    elif isinstance(spec, Iterable) and not isinstance(spec, str | bytes | type | nn.Module):
        items = sorted(spec, key=str) if isinstance(spec, set | frozenset) else spec
        pairs = [(item, argument, None) for item in items]
    else:
        pairs = [(spec, argument, None)]
    if not pairs:
        raise ArgumentError(f"{argument} is empty: it must name at least one module.")
    return tuple(_pattern(item, name, value, keywords or {}) for item, name, value in pairs)


def _pattern(item: Any, argument: str, value: Any, keywords: Mapping[str, Predicate]) -> Pattern:
    if isinstance(item, Pattern):
        return replace(item, settings=value)
    if isinstance(item, re.Pattern):
        item = _as_text(item)
    if isinstance(item, str):
        if item in keywords:
            return Pattern(item, keywords[item], settings=value)
        test, wide = _text_test(item, argument), _is_wide(item)
        last = None if wide else item.rpartition(".")[2]
        return Pattern(item, test, by_name=True, wide=wide, last=last, settings=value)
    if isinstance(item, type) and issubclass(item, nn.Module):
        label = f"class {item.__name__}"
        return Pattern(label, lambda _, module: isinstance(module, item), settings=value)
    if callable(item) and not isinstance(item, type | nn.Module):
        label = getattr(item, "__name__", type(item).__name__)
        return Pattern(f"{label}()", lambda p, m: bool(item(p, m)), settings=value)
    raise ArgumentError(
        f"{argument} holds {item!r}, which is not a pattern.",
        remedy='Use a name, a glob, "re:...", a module class or a callable (path, module) -> bool.',
    )


def _as_text(compiled: "re.Pattern[Any]") -> Any:
    """A compiled expression as it is written here, its flags inside of it."""
    letters = {re.I: "i", re.M: "m", re.S: "s", re.X: "x", re.A: "a"}
    flags = "".join(letter for flag, letter in letters.items() if compiled.flags & flag)
    flags = f"(?{flags})" if flags else ""
    # Of bytes, which match no path, it is no pattern.
    return f"re:{flags}{compiled.pattern}" if isinstance(compiled.pattern, str) else compiled


def _is_wide(text: str) -> bool:
    return text.startswith("re:") or any(character in text for character in "*?[")


def _text_test(text: str, argument: str) -> Predicate:
    if text.startswith("re:"):
        expression = text.removeprefix("re:")
        matches = Expression(expression, argument, ArgumentError, Limits()).matches
        return lambda path, _: matches(path)
    if not text.strip():
        raise ArgumentError(f"{argument} holds an empty string, which names no module.")
    if _is_wide(text):
        return lambda path, _: fnmatch.fnmatchcase(path, text)
    suffix = "." + text
    return lambda path, _: path == text or path.endswith(suffix)


def in_blocks(
    modules: Iterable[NamedModule], layers: tuple[int, ...], model: nn.Module
) -> set[nn.Module]:
    """The modules that lie in the blocks of these indices.

    A block index is the first component of a path that is a number (``model.layers.3.mlp.up``: 3);
    negative indices count from the end of the list that holds the block.

    Raises:
        ArgumentError: an index is used by no module.
    """
    wanted, ends = set(layers), dict[str, dict[int, int]]()
    kept, met, unused = set(), set(), set(wanted)
    for named in modules:
        for path in named.paths:
            block = _block(path)
            if block is None:
                continue
            blocks, index = block
            if blocks not in ends:
                ends[blocks] = _from_the_end(model.get_submodule(blocks))
            names = {index, ends[blocks][index]} & wanted
            met.add(index)
            unused -= names
            if names:
                kept.add(named.module)
    if unused:
        there = f"the targets lie in blocks {braces(met)}" if met else "no target lies in a block"
        raise ArgumentError(f"layers={sorted(unused)} selects nothing: {there}.")
    return kept


def _block(path: str) -> tuple[str, int] | None:
    """The path of the list of blocks that a path goes through, and the index in it."""
    components = path.split(".")
    for depth, component in enumerate(components):
        if component.isdecimal():
            return ".".join(components[:depth]), int(component)
    return None


def _from_the_end(blocks: nn.Module) -> dict[int, int]:
    """The negative index of each block."""
    indices = sorted(int(name) for name in blocks._modules if name.isdecimal())
    return {index: position - len(indices) for position, index in enumerate(indices)}


def braces(numbers: Iterable[int]) -> str:
    """Numbers in short: {0, 1, 2, 5} becomes '{0..2,5}'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return "{" + ",".join(parts) + "}"


def close_names(wanted: str, names: Iterable[str], most: int = 4) -> list[str]:
    """The names most like the one that was asked for, best first."""
    depth = wanted.count(".") + 1
    tails = {".".join(name.split(".")[-depth:]): None for name in names}
    return difflib.get_close_matches(wanted, list(tails), n=most)
