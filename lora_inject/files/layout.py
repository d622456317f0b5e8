"""A file's adapter laid out over a model: which module each pair is for, and as that needs it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.core.paths import bare, bare_key, bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.added import sums
from lora_inject.files.checkpoint_names import as_in_model
from lora_inject.files.fingerprint import differs, how_it_differs
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.one_place import Given, is_repeated, is_repeated_pair
from lora_inject.files.laid_out import LaidOutPair, LaidOutTensor
from lora_inject.files.rows import reads_ids, tables_over
from lora_inject.files.stored_pair import is_same_update
from lora_inject.files.token_rows import warn_of_other_rows
from lora_inject.files.turning import in_parts, turned
from lora_inject.files.untouched import warn_of_other_weights
from lora_inject.files.vocabulary import require_rows
from lora_inject.kinds import find_kind
from lora_inject.own import Place, own_tensor
from lora_inject.sharding import whole

# What to do about a base in which all weights differ in the same way.
_OTHER_BASE = {
    "": "Load the right base model, or say other_base=True.",
    "rounding": "They differ by rounding alone, as a cast to 16 bits and back leaves it: say "
    "other_base=True where that is meant.",
    "rows": "They differ in the number of rows alone: give the base as many tokens or outputs as "
    "it had then (resize_token_embeddings), or say other_base=True.",
}


class Layout:
    """A file's adapter laid out over a model; made without changing the model.

    Args:
        look: the model.
        data: what the file holds.
        adapter: the name to load it under.

    Raises:
        FormatError: a module of the file is not in the model.
    """

    def __init__(self, look: Look, data: AdapterData, adapter: str) -> None:
        self.modules = bare_modules(look.index.by_path)
        data = as_in_model(data, bare(look.model), self.modules)
        self.look, self.data = look, data
        real = {module: paths[0] for module, paths in look.index.paths.items()}
        self.all_pairs: list[LaidOutPair] = []
        unknown, given = [], Given()
        for pair in data.pairs:
            path = bare_key(pair.path, self.modules)
            module = self.modules.get(path)
            if module is None:
                unknown.append(pair.path)
            elif not is_repeated_pair(given, (module, pair.weight, pair.part), pair.name, pair):
                pair = pair if path == pair.path else replace(pair, path=path)
                state = look.states.get(module)
                own = [a for a in state.adapters if a.name == adapter] if state else []
                self.all_pairs += [
                    LaidOutPair(turned(part, module), module, real[module])
                    for part in in_parts(pair, module, own)
                ]
        others: list[LaidOutTensor] = []
        for name, tensor in data.tensors.items():
            owner, _, last = name.rpartition(".")
            path = bare_key(owner, self.modules)
            module = self.modules.get(path)
            if module is None or own_tensor(module, last) is None:
                unknown.append(name)
            elif not is_repeated(given, (module, last), name, tensor):
                others.append(LaidOutTensor(path, module, last, tensor, name))
        self.tables = tables_over(data.tables, self.modules, real, unknown)
        if unknown:
            shown = ", ".join(name[:200] for name in unknown[:3])
            raise FormatError(
                f"{len(unknown):,} of the file's layers and tensors are not in this "
                f"{type(look.model).__name__}: {shown}{', ...' if unknown[3:] else ''}.",
                remedy=f"Nothing was loaded. {_where_it_fits(unknown, self.modules)}",
            )
        require_rows(
            look.model,
            [(fitted.pair.path, fitted.module, fitted.pair) for fitted in self.all_pairs],
            [(other.path, other.module, other.value) for other in others],
        )
        self.others = [other for other in others if not self._is_the_bases(other, adapter)]
        values = {other.key: other.value for other in self.others}
        more = {each.key: each for each in sums(data.added, self.modules, values)}
        self.others = [other for other in self.others if other.key not in more] + [*more.values()]
        order = {module: i for i, module in enumerate(real)}
        self.all_pairs.sort(key=lambda fitted: order[fitted.module])  # files sort by name
        self.pairs = self._without_tied()

    @property
    def pairs_by_key(self) -> dict[str, Tensor]:
        """The tensors of the pairs by loralib's keys."""
        return {
            f"{f.pair.key}lora_{role}": tensor
            for f in self.all_pairs
            for role, tensor in f.pair.tensors.items()
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The other tensors by their names in the bare model."""
        return {other.key: other.value for other in self.others}

    @property
    def places(self) -> dict[Place, Tensor]:
        """The other tensors by module and name."""
        return {(other.module, other.name): other.value for other in self.others}

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling that each pair was made for, where the file says it."""
        return {f.pair.key: f.pair.scaling for f in self.all_pairs if f.pair.alpha is not None}

    def elsewhere(self) -> set[str]:
        """The paths where an adapted weight is registered too, and which the file does not name.

        But for rows of an embedding, which are those of a tied head too.
        """
        named = {f.module for f in self.all_pairs} | {f.module for f in self.tables}
        ids = {id(f.module._parameters.get(f.pair.weight)) for f in self.all_pairs} - {id(None)}
        ids |= {id(f.module._parameters["weight"]) for f in self.tables if not reads_ids(f.module)}
        return {
            path
            for path, module in self.look.index.by_path.items()
            if module not in named and ids & {id(p) for p in module._parameters.values()}
        }

    def require_tied(self, training: Container[Place]) -> None:
        """Refuse values for a tied tensor that are not those of all its places.

        Where it does not train, as embeddings that a file brings along, the value of one place is
        that of the others.

        Raises:
            FormatError: there are such, by path.
        """
        given = {(other.module, other.name): other for other in self.others}
        for places in self.look.tensor_places.values() if given else ():
            there = [given[place] for place in places if place in given]
            same = all(torch.equal(there[0].value, other.value) for other in there[1:])
            one_for_all = len(there) == len(places) or not any(p in training for p in places)
            if there and not (same and one_for_all):
                names = [f"{self.look.index.path(m)}.{n}" for m, n in places]
                said = " and ".join(other.key for other in there)
                raise FormatError(
                    f"{names[0]} is tied in this model to {', '.join(names[1:])}, and the file has "
                    f"values of its own for {said}{'' if same else ', which differ'}.",
                    remedy="Untie them before loading (transformers: tie_word_embeddings=False).",
                )

    def check_base(self) -> None:
        """Refuse a model that is not the base of the adapter; warn of what else of it is another.

        Raises:
            FormatError: adapted weights differ, by path.
        """
        if wrong := self._differing(self.data.base):
            hows, names = {how for _, how in wrong.values()}, list(wrong)
            raise FormatError(
                f"{self._other_shape(wrong)}{len(wrong):,} of {len(self.data.base):,} adapted "
                "weights are not those that the adapter was made for: "
                f"{', '.join(names[:3])}{', ...' if names[3:] else ''}.",
                remedy=_OTHER_BASE[hows.pop() if len(hows) == 1 else ""],
            )
        warn_of_other_rows(self.data.rows, self._differing(self.data.rows))
        untouched = self.data.untouched
        warn_of_other_weights(self.look, self._printed(untouched), untouched)

    def _other_shape(self, wrong: Mapping[str, tuple[Tensor, str]]) -> str:
        """The first of these weights that has another shape than it had, if there is one."""
        for key, (weight, _) in wrong.items():
            former = tuple(self.data.base[key].get("shape", ()))
            if former != tuple(weight.shape):
                return (
                    f"{key} has the shape {tuple(weight.shape)} here, and {former} in the model of "
                    "the adapter: "
                )
        return ""

    def _differing(self, prints: Mapping[str, Any]) -> dict[str, tuple[Tensor, str]]:
        """The weights that are not those of which fingerprints were taken, and how, by name."""
        found = {}
        for key, (module, name) in self._printed(prints).items():
            kind = find_kind(module)
            weight = kind.weight(module, name) if kind else own_tensor(module, name)
            if weight is not None and differs(prints[key], weight):
                found[key] = weight, how_it_differs(prints[key], weight)
        return found

    def _printed(self, prints: Mapping[str, Any]) -> dict[str, Place]:
        """The places of weights of which fingerprints were taken, by name."""
        found = {}
        for key, saved in prints.items():
            owner, _, name = key.rpartition(".")
            module = self.modules.get(bare_key(owner, self.modules))
            if module is not None and isinstance(saved, Mapping):
                found[key] = module, name
        return found

    @property
    def base(self) -> dict[str, Mapping[str, Any]]:
        """The fingerprints of the weights that the adapter was made for, by path in this model."""
        places = self._printed(self.data.base).items()
        return {
            f"{self.look.index.path(m)}.{n}".lstrip("."): self.data.base[k] for k, (m, n) in places
        }

    def _is_the_bases(self, other: LaidOutTensor, adapter: str) -> bool:
        """Whether a tensor of the file only repeats the base, as PEFT saves adapted embeddings.

        Raises:
            FormatError: it is the weight of an adapted layer, and another one.
        """
        owner, state = other.given.rpartition(".")[0], self.look.states.get(other.module)
        trained = None if state is None else state.find(other.name)
        if trained is not None and adapter in trained.owners:
            return False
        value = own_tensor(other.module, other.name) if trained is None else trained.former
        paths = {owner, *self.look.index.paths[other.module]}  # of a shared one another is first
        tops = [(path, top) for path in paths for top in self.data.train_also]
        inside = any(f"{path}.".startswith(f"{top}.") or path.endswith(top) for path, top in tops)
        same = value is not None and _is_equal(other.value, whole(value.detach()))
        if same and not inside and "bias" not in other.name:  # bias_ih_l0 of a layer too
            return True
        if not same and other.given in self.data.facts.get("base_weights", ()):
            raise FormatError(
                f"the file holds the weight of the adapted layer {owner}, and it is not that of "
                "this model.",
                remedy="Load the base that it was trained on.",
            )
        return False

    def _without_tied(self) -> list[LaidOutPair]:
        """One pair of those that a tied weight has in files, where they agree.

        Raises:
            FormatError: they do not.
        """
        first: dict[int, LaidOutPair] = {}
        kept = []
        for fitted in self.all_pairs:
            W = fitted.module._parameters.get(fitted.pair.weight)
            leader = None if W is None or fitted.pair.part else first.setdefault(id(W), fitted)
            if leader is None or leader is fitted or leader.module is fitted.module:
                kept.append(fitted)
            elif not is_same_update(leader.pair, fitted.pair):
                raise FormatError(
                    f"{fitted.pair.path} and {leader.pair.path} are tied in this model and have "
                    "different adapters in the file.",
                    remedy="Untie them before loading.",
                )
        return kept


def _where_it_fits(names: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    """What to do about names that are not in a model: they may be of a part, or of a whole."""

    def is_there(name: str) -> bool:
        owner = name.rpartition(".")[0]  # of a tensor
        return name in modules or (owner != "" and owner in modules)

    first = names[0].split(".")
    for path in modules:
        if path and all(is_there(f"{path}.{name}") for name in names):
            return f"It is for the part {path!r} of this model: load(model.{path}, ...)."
    for depth in range(1, len(first)):
        prefix = ".".join(first[:depth]) + "."
        if all(n.startswith(prefix) and is_there(n.removeprefix(prefix)) for n in names):
            return (
                f"Its names have the prefix {prefix!r}: load it into the model that holds this one "
                "under that name."
            )
    return "Is it for another model?"


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two values are one, in the coarser of their dtypes."""
    return (
        one.shape == other.shape
        and one.is_complex() == other.is_complex()
        and (torch.equal(one.to(other), other) or torch.equal(other.to(one), one))
    )
