"""A file's adapter laid out over a model: which module each pair is for, and as that needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.low_rank import same_product
from lora_inject.core.look import Look
from lora_inject.core.paths import bare_key, bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.fingerprint import differs
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.rows import LaidOutRows, laid_out, reads_ids, without_tied_rows
from lora_inject.kinds import find_kind
from lora_inject.kinds.parameter import layout_of
from lora_inject.own import Place, own_tensor
from lora_inject.sharding import whole
from lora_inject.variants import OTHER


class LaidOutPair(NamedTuple):
    """A pair of the file with the module that it is for, turned as that needs it.

    Attributes:
        pair: the pair, with the module's path in the bare model.
        module: the module.
        real: the module's path in the model as it is, wrappers included.
    """

    pair: PairData
    module: nn.Module
    real: str

    @property
    def target(self) -> str:
        """What ``inject`` is to be told to get it."""
        if find_kind(self.module) is not None:
            return self.real
        return f"{self.real}.{self.pair.weight}".lstrip(".")


class Layout:
    """A file's adapter laid out over a model; made without changing the model.

    Raises:
        FormatError: a module of the file is not in the model.
    """

    def __init__(self, look: Look, data: AdapterData) -> None:
        self.look, self.data = look, data
        self.modules = bare_modules(look.index.by_path)
        real = {module: paths[0] for module, paths in look.index.paths.items()}
        self.all_pairs: list[LaidOutPair] = []
        unknown = []
        for pair in data.pairs:
            path = bare_key(pair.path, self.modules)
            module = self.modules.get(path)
            if module is None:
                unknown.append(pair.path)
            else:
                pair = pair if path == pair.path else replace(pair, path=path)
                self.all_pairs.append(LaidOutPair(_turned(pair, module), module, real[module]))
        rows: list[LaidOutRows] = []
        for own in data.rows:
            path = bare_key(own.path, self.modules)
            module = self.modules.get(path)
            if module is None:
                unknown.append(own.path)
            else:
                rows.append(laid_out(replace(own, path=path), module, real[module]))
        self.rows = without_tied_rows(rows)
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in data.tensors.items():
            owner, _, last = name.rpartition(".")
            path = bare_key(owner, self.modules)
            module = self.modules.get(path)
            value = None if module is None else own_tensor(module, last)
            if value is None:
                unknown.append(name)
            elif not _is_the_bases(name, tensor, value, data):
                self.tensors[f"{path}.{last}".lstrip(".")] = tensor
        for name, added in data.added.items():
            path, _, last = name.rpartition(".")
            path = bare_key(path, self.modules)
            if path in self.modules:  # or it is among the unknown already, with its A and B
                key = f"{path}.{last}".lstrip(".")
                self.tensors[key] = _with(self.tensors.get(key), added, self.modules[path], key)
        if unknown:
            shown = ", ".join(name[:200] for name in unknown[:3])
            raise FormatError(
                f"{len(unknown):,} of the file's layers and tensors are not in this "
                f"{type(look.model).__name__}: {shown}{', ...' if unknown[3:] else ''}.",
                remedy=f"Nothing was loaded. {_where_it_fits(unknown, self.modules)}",
            )
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
    def scalings(self) -> dict[str, float]:
        """The scaling that each pair was made for, where the file says it."""
        return {f.pair.key: f.pair.scaling for f in self.all_pairs if f.pair.alpha is not None}

    def elsewhere(self) -> set[str]:
        """The paths where an adapted weight is registered too, and which the file does not name.

        But for rows of an embedding, which are those of a tied head too.
        """
        named = {f.module for f in self.all_pairs} | {f.module for f in self.rows}
        ids = {id(f.module._parameters.get(f.pair.weight)) for f in self.all_pairs} - {id(None)}
        ids |= {id(f.module._parameters["weight"]) for f in self.rows if not reads_ids(f.module)}
        return {
            path
            for path, module in self.look.index.by_path.items()
            if module not in named and ids & {id(p) for p in module._parameters.values()}
        }

    def require_tied(self) -> None:
        """Refuse values for some places of a tied tensor alone, or different ones.

        Raises:
            FormatError: there are such.
        """
        given = self.places()
        for tied in self.look.tensor_places.values() if given else ():
            values = [given[place] for place in tied if place in given]
            if values and (len(values) < len(tied) or not all(
                torch.equal(values[0], value) for value in values[1:]
            )):  # fmt: skip
                raise FormatError(
                    f"{tied[0][1]} is tied in this model, and the file has values of its own for "
                    f"one of its {len(tied)} places.",
                    remedy="Untie it before loading.",
                )

    def places(self) -> dict[Place, Tensor]:
        """The other tensors by owner and name."""
        split = {key: key.rpartition(".") for key in self.tensors}
        return {(self.modules[o], n): self.tensors[key] for key, (o, _, n) in split.items()}

    def check_base(self) -> None:
        """Refuse a model that is not the base of the adapter.

        Raises:
            FormatError: adapted weights differ, by path.
        """
        wrong = []
        for key, saved in self.data.base.items():
            owner, _, name = key.rpartition(".")
            module = self.modules.get(bare_key(owner, self.modules))
            kind = None if module is None else find_kind(module)
            weight = None
            if module is not None:
                weight = kind.weight(module, name) if kind else own_tensor(module, name)
            if isinstance(saved, Mapping) and weight is not None and differs(saved, weight):
                wrong.append(key)
        if wrong:
            raise FormatError(
                f"{len(wrong):,} of {len(self.data.base):,} adapted weights are not those that the "
                f"adapter was made for: {', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}.",
                remedy="Load the right base model, or say other_base=True.",
            )

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
            elif not _same_update(leader.pair, fitted.pair):
                raise FormatError(
                    f"{fitted.pair.path} and {leader.pair.path} are tied in this model and have "
                    "different adapters in the file.",
                    remedy="Untie them before loading.",
                )
        return kept


def _with(given: Tensor | None, added: Tensor, module: nn.Module, key: str) -> Tensor:
    """The value of a bias with what a file adds to it.

    Raises:
        FormatError: the layer has none.
    """
    own = own_tensor(module, key.rpartition(".")[2])
    if own is None:
        raise FormatError(
            "the file adds to its bias (lora_bias), and it has none.",
            path=key.rpartition(".")[0],
            remedy="Give it one of zeros before loading: layer.bias = nn.Parameter(torch.zeros("
            f"{added.shape[0]})).",
        )
    value = whole(own.detach()) if given is None else given
    return value.to(torch.promote_types(value.dtype, added.dtype)) + added.to(value.device)


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


def _is_the_bases(name: str, tensor: Tensor, value: Tensor, data: AdapterData) -> bool:
    """Whether a tensor of the file only repeats the base, as PEFT saves adapted embeddings.

    Raises:
        FormatError: it is the weight of an adapted layer, and another one.
    """
    owner = name.rpartition(".")[0]
    inside = any(
        f"{owner}.".startswith(f"{top}.") or owner.endswith(top) for top in data.train_also
    )
    value = whole(value.detach())
    same = tensor.shape == value.shape and torch.equal(tensor.to(value), value)
    if same and not inside and "bias" not in name.rpartition(".")[2]:  # bias_ih_l0 of a layer too
        return True
    if not same and name in data.facts.get("base_weights", ()):
        raise FormatError(
            f"the file holds the weight of the adapted layer {owner}, and it is not that of this "
            "model.",
            remedy="Load the right base, resized as it was.",
        )
    return False


def _turned(pair: PairData, module: nn.Module) -> PairData:
    """The pair as the weight that it is for stands in the module."""
    if pair.alpha is not None and pair.alpha < 0:
        pair = replace(pair, alpha=-pair.alpha, B=-pair.B)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return _of_groups(pair, module.groups, module.in_channels)
    W = module._parameters.get(pair.weight)
    own = layout_of(module, W) if W is not None and pair.form == "experts" else None
    if own is not None and pair.layout and own != pair.layout:
        A, B = pair.B.transpose(-2, -1), pair.A.transpose(-2, -1)
        return replace(pair, A=A, B=B, layout=own, fixed=OTHER[pair.fixed])
    return pair


def _of_groups(pair: PairData, groups: int, channels: int) -> PairData:
    """A pair of a grouped convolution, whose A may be for all channels, as PEFT has it.

    Raises:
        FormatError: A mixes channels of several groups, which no grouped weight can do.
    """
    if pair.A.dim() < 3 or pair.A.shape[1] != channels or pair.A.shape[0] % groups:
        return pair
    blocks = pair.A.reshape(groups, -1, groups, channels // groups, *pair.A.shape[2:])
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if own.count_nonzero() != blocks.count_nonzero():
        raise FormatError(
            "its adapter mixes channels of several groups, which a grouped convolution cannot.",
            path=pair.path,
        )
    return replace(pair, A=own.flatten(0, 1))


def _same_update(one: PairData, other: PairData) -> bool:
    """Whether two pairs are one, the same way round or the other."""
    A, B = other.A, other.B * (other.scaling / one.scaling)
    turned = B.transpose(-2, -1), A.transpose(-2, -1)
    return any(same_product((one.A, one.B), pair) for pair in ((A, B), turned))
