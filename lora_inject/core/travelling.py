"""The settings of adapters travel with their tensors, and are compared where those are loaded.

A scaling is no tensor: values that were trained with one compute something else with another, and
every shape fits. So a state dict of what ``inject`` was called on says them in its ``_metadata``,
torch's place for what is no tensor: the keys stay what they are, ``torch.save`` keeps it, and a
state dict without it loads as ever. Files that hold tensors alone have an entry for it.
"""

import json
import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import Edit, items_edits
from lora_inject.changes.hooks import new_key
from lora_inject.core.adapter import Adapter, Pair
from lora_inject.core.loading import (
    Loaded,
    after_loading,
    before_loading,
    merged_weights,
    require_as_merged,
)
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.errors import FormatError

MERGED = "lora_inject_merged"  # in the metadata too: the keys of merged weights
SETTINGS = "lora_inject"  # in the metadata of a state dict, for what stands at one path
ENTRY = "lora_settings"  # the key in files that hold tensors alone


class Described(NamedTuple):
    """The settings on which the meaning of a pair depends.

    Attributes:
        r: the rank.
        alpha: alpha.
        factor: what ``B A`` counts with.
        variant: what is not plain LoRA, in words.
        turned: whether it is the pair of a tied layer in which the weight stands the other way.
    """

    r: int
    alpha: float
    factor: float
    variant: str
    turned: bool

    def is_like(self, other: "Described") -> bool:
        """Whether one may have the tensors of the other; their shapes tell the rank."""
        same = abs(self.factor - other.factor) <= 1e-6 * abs(self.factor)
        return same and self.variant == other.variant and self.turned == other.turned

    def __str__(self) -> str:
        return f"r={self.r}, alpha={self.alpha:g}" + (f", {self.variant}" if self.variant else "")


SettingsByKey = Mapping[str, Described]  # the key is that of A


def described(adapter: Adapter, pair: Pair) -> Described:
    """The settings of a pair of an adapter."""
    own, spec = adapter.settings, pair.spec
    text = own.variant.meaning.removeprefix(", ")
    return Described(spec.rank, float(own.alpha), float(own.scaling), text, spec.swapped)


def _settings_of(look: Look) -> SettingsByKey:
    """The settings of every adapter of a model, by the key of its A in the model's state dict."""
    return {
        f"{path}.{next(iter(pair.names.values()))}".lstrip("."): described(adapter, pair)
        for module, adapter in look.adapters
        for path in look.index.paths[module]
        for pair in adapter.pairs
    }


def saying(tensors: Mapping[str, Tensor], settings: SettingsByKey) -> dict[str, Tensor]:
    """A state dict that says settings, as one of torch does."""
    state = OrderedDict(tensors)
    state._metadata = {"": {SETTINGS: {k: tuple(s) for k, s in settings.items()}}}  # type: ignore[attr-defined]
    return state


def said(state: Mapping[str, Tensor]) -> SettingsByKey:
    """The settings that a state dict says; none where it is a plain dict.

    Raises:
        FormatError: they cannot be read.
    """
    return _read(getattr(state, "_metadata", {}).get("", {}).get(SETTINGS, {}))


def as_entry(model: nn.Module) -> Tensor:
    """The settings of a model's adapters as a tensor, for files that hold nothing else."""
    text = json.dumps(_settings_of(Look(model)))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def travelling_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Let what ``inject`` was called on say settings and compare them, or no more."""
    on = bool(state and state.reach.roots)
    if on == bool(old and old.reach.roots):
        return []
    edits: list[Edit] = []
    for hooks, ours in (
        (module._state_dict_hooks, _say),
        (module._load_state_dict_pre_hooks, _Comparing(module)),
        (module._load_state_dict_post_hooks, _settle),
    ):
        kept = [(k, h) for k, h in hooks.items() if h is not ours and type(h) is not _Comparing]
        edits += items_edits(hooks, [*kept, (new_key(), ours)] if on else kept)
    return edits


def _say(module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook that writes the settings into a state dict.

    At every path above a layer: it may be loaded where ``inject`` was called on more, or on less.
    """
    places = getattr(state_dict, "_metadata", {prefix[:-1]: metadata})
    look, below = Look(module), dict[str, dict[str, Any]]()
    below[SETTINGS] = {key: tuple(each) for key, each in _settings_of(look).items()}
    below[MERGED] = dict.fromkeys(merged_weights(look, shown=True), True)
    for kind, said_of in below.items():
        for key, each in said_of.items():
            names = f"{prefix}{key}".split(".")
            for depth in range(len(names)):
                place = places.get(".".join(names[:depth]))
                if place is not None:
                    place.setdefault(kind, {})[".".join(names[depth:])] = each


class _Comparing:
    """A hook that compares them, before anything below its module is loaded.

    It knows the module weakly, as torch's own hooks of this kind do.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.places: list[Loaded] = []  # of what trains in place, while a base is loaded

    def __reduce__(self) -> Any:
        return _Comparing, (self.module(),)

    def __call__(
        self, state_dict: MutableMapping[str, Any], prefix: str, metadata: Any, *_: Any
    ) -> None:
        module, given = self.module(), dict(_read(metadata.get(SETTINGS, {})))
        if (entry := state_dict.pop(f"{prefix}{ENTRY}", None)) is not None:
            given |= _of_entry(entry)
        if module is None:
            return
        keys = {k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)}
        look = Look(module)
        own = _settings_of(look)
        _require_alike(own, {k: s for k, s in given.items() if k in keys})
        require_as_merged(look, keys, metadata.get(MERGED, {}))
        is_base = keys.isdisjoint(own)
        self.places = before_loading(look, keys) if is_base else []


def _settle(module: nn.Module, _: Any) -> None:
    """A hook for after a load."""
    for hook in module._load_state_dict_pre_hooks.values():
        if type(hook) is _Comparing and hook.places:
            places, hook.places = hook.places, []
            after_loading(Look(module), places)


def _require_alike(own: SettingsByKey, given: SettingsByKey) -> None:
    """Refuse values that were made with other settings than those of the adapters they are for.

    Raises:
        FormatError: they differ, with an example.
    """
    other = [key for key, theirs in given.items() if key in own and not own[key].is_like(theirs)]
    if other:
        key = other[0]
        raise FormatError(
            f"{len(other):,} of the pairs were made with other settings than the model's: {key} "
            f"with {given[key]}, and here it is {own[key]}.",
            remedy="Nothing was loaded. Inject with the same settings; or, where this is meant, "
            f"hand over a plain dict of the tensors, without {ENTRY}.",
        )


def _of_entry(entry: Any) -> SettingsByKey:
    """The settings that an entry says.

    Raises:
        FormatError: it cannot be read.
    """
    try:
        return _read(json.loads(bytes(entry.tolist())))
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{ENTRY} cannot be read: {error}.") from error


def _read(value: Any) -> SettingsByKey:
    """Settings that came with values.

    Raises:
        FormatError: they are none.
    """
    try:
        each = {str(key): Described(*settings) for key, settings in value.items()}
        if all(math.isfinite(s.factor) and isinstance(s.variant, str) for s in each.values()):
            return each
    except (AttributeError, TypeError, ValueError, OverflowError):
        pass
    raise FormatError("the settings that come with the values cannot be read.")
