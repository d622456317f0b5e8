"""Save an adapter to disk and load it into a model, in any format; strict, and all or nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError, FormatError
from lora_inject.fingerprint import differs
from lora_inject.formats import FORMATS, find_format, peft
from lora_inject.formats.data import AdapterData, PairData
from lora_inject.freeze import in_place, select_in_full
from lora_inject.in_place import Place, own_tensor
from lora_inject.kinds import find_kind
from lora_inject.kinds.parameter import layout_of
from lora_inject.plan import Plan, plan
from lora_inject.record import records_in
from lora_inject.selection import View
from lora_inject.settings import check_adapter, check_bias
from lora_inject.state import Stored, bare_key, bare_paths, not_finite
from lora_inject.surgery import apply
from lora_inject.targets import Pattern, Predicate


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    format: str = "peft",
    portable: bool = False,
) -> None:
    """Save an adapter: A, B, and the biases and modules that it trained.

    The default is a PEFT directory, which PEFT, vLLM and diffusers read. A save that is interrupted
    leaves the files that were there.

    Example:
        >>> save(model, "adapter")  # doctest: +SKIP

    Args:
        model: an adapted model, or a wrapper that holds it.
        path: a directory for "peft" and "diffusers", a file for the others; made if need be.
        adapter: the adapter's name; None for the only one there is, or the only one in use.
        format: "peft", "loralib" (a .pt file), "kohya" or "diffusers".
        portable: write one rank and a scaling of 1 for all layers, for readers that know no
            patterns (vLLM): ranks are padded with zeros and scalings folded into B.

    Raises:
        ArgumentError: the format or the adapter is not known.
        FormatError: the format has no word for something of the adapter, or the path cannot be
            written to. Nothing has been written then.
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    if format not in FORMATS:
        raise ArgumentError(f"format must be one of {list(FORMATS)}, not {format!r}.")
    data = Stored(model, adapter).data()
    FORMATS[format].write(peft.portable(data) if portable else data, Path(fspath(path)))


def load(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str = "default",
    format: str | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    other_base: bool = False,
) -> nn.Module:
    """Load an adapter, into the one of this name if the model has it, else as a new one.

    Values that fill an adapter keep its Parameters, so that an optimizer and a compiled model stay
    valid; a smaller rank is padded with zeros, and another scaling goes into B. A new adapter is in
    use at once if no other is; otherwise it waits for ``use``. Every tensor of the file must have
    its place and every place its tensor.

    Example:
        >>> load(model, "adapter")  # doctest: +SKIP

    Args:
        model: any model.
        path: what ``save``, PEFT, diffusers, loralib or kohya's scripts wrote.
        adapter: the name to load it under.
        format: "peft", "loralib", "kohya" or "diffusers"; None finds out.
        alpha: for files that do not say it, as loralib's; scaling is alpha / r.
        dtype: of a new adapter's A and B, as in ``inject``.
        other_base: load although the model is not the base that the adapter was made for.

    Returns:
        The same model.

    Raises:
        ArgumentError: an argument cannot be used.
        FormatError: the file is not there, not whole or not safe, or does not fit the model; with
            counts and examples. Nothing has changed then.
        UnsupportedLayerError: a layer of the file cannot be adapted in this model.
        LoRAInjectError: the model is merged or inside a block.
    """
    adapter = check_adapter(adapter)
    file = Path(fspath(path))
    data = find_format(file, format).read(file, model, alpha)
    if not data.pairs:
        raise FormatError(f"{file} holds no A and B.")
    wanted = _Wanted(model, data)
    if not other_base:
        wanted.check_base()
    if any(adapter in record.modes for _, _, record in records_in(model)):
        stored = Stored(model, adapter)
        if data.bias:
            stored.check_bias(check_bias(data.bias))
        stored.fill({**wanted.tensors, **wanted.pairs_by_key}, wanted.scalings)
        return model
    _inject(model, wanted, adapter, dtype)
    return model


@dataclass(frozen=True)
class _Fitted:
    """A pair of the file with the module that it is for, turned as that needs it."""

    pair: PairData
    module: nn.Module
    real: str  # the module's path in the model as it is, wrappers included
    prefix: str

    @property
    def key(self) -> str:
        """The start of loralib's keys for it."""
        return f"{self.pair.path}.{self.prefix}".lstrip(".")

    @property
    def target(self) -> str:
        """What ``inject`` is to be told to get it."""
        plain = self.pair.weight == "weight" or find_kind(self.module) is not None
        return self.real if plain else f"{self.real}.{self.pair.weight}".lstrip(".")


class _Wanted:
    """A file's adapter laid out over a model; made without changing the model.

    Raises:
        FormatError: a module of the file is not in the model.
    """

    def __init__(self, model: nn.Module, data: AdapterData) -> None:
        self.model, self.data = model, data
        self.modules = {path: module for module, path in reversed(bare_paths(model).items())}
        real = {module: path for path, module in reversed(list(model.named_modules()))}
        self.pairs: list[_Fitted] = []
        unknown = []
        for pair in data.pairs:
            path = bare_key(pair.path, self.modules)
            module = self.modules.get(path)
            if module is None:
                unknown.append(pair.path)
            else:
                pair = pair if path == pair.path else replace(pair, path=path)
                pair = _turned(pair, module)
                self.pairs.append(_Fitted(pair, module, real[module], _prefix(pair)))
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in data.tensors.items():
            owner, _, last = name.rpartition(".")
            path = bare_key(owner, self.modules)
            module = self.modules.get(path)
            if module is None or own_tensor(module, last) is None:
                unknown.append(name)
            else:
                self.tensors[f"{path}.{last}".lstrip(".")] = tensor
        if unknown:
            shown = ", ".join(name[:200] for name in unknown[:3])
            raise FormatError(
                f"{len(unknown):,} of the file's layers and tensors are not in this "
                f"{type(model).__name__}: {shown}{', ...' if unknown[3:] else ''}.",
                remedy="Nothing was loaded. Is it for another model?",
            )
        order = {module: i for i, module in enumerate(real)}
        self.pairs.sort(key=lambda fitted: -order[fitted.module])  # files sort by name
        self._drop_tied()

    @property
    def pairs_by_key(self) -> dict[str, Tensor]:
        """A and B by loralib's keys."""
        halves = [(f.key, f.pair.A, f.pair.B) for f in self.pairs]
        return {f"{key}lora_{x}": t for key, A, B in halves for x, t in (("A", A), ("B", B))}

    @property
    def scalings(self) -> dict[str, float]:
        """The scaling that each pair was made for, where the file says it."""
        return {f.key: f.pair.scaling for f in self.pairs if f.pair.alpha is not None}

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
            weight = None if module is None else own_tensor(module, name)
            if isinstance(saved, Mapping) and weight is not None and differs(saved, weight):
                wrong.append(key)
        if wrong:
            raise FormatError(
                f"{len(wrong):,} of {len(self.data.base):,} adapted weights are not those that the "
                f"adapter was made for: {', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}.",
                remedy="Load the right base model, or say other_base=True.",
            )

    def _drop_tied(self) -> None:
        """Keep one pair of those that a tied weight has in files, where they agree.

        Raises:
            FormatError: they do not.
        """
        first: dict[int, _Fitted] = {}
        kept = []
        for fitted in self.pairs:
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
        self.pairs = kept


def _prefix(pair: PairData) -> str:
    if pair.part:
        return f"{pair.part}_"
    return "" if pair.weight == "weight" else f"{pair.weight}_"


def _turned(pair: PairData, module: nn.Module) -> PairData:
    """The pair as the weight that it is for stands in the module."""
    if pair.alpha is not None and pair.alpha < 0:
        pair = replace(pair, alpha=-pair.alpha, B=-pair.B)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return _of_groups(pair, module.groups, module.in_channels)
    W = module._parameters.get(pair.weight)
    own = layout_of(module, W) if W is not None and pair.form == "experts" else None
    if own is not None and pair.layout and own != pair.layout:
        return replace(pair, A=pair.B.transpose(-2, -1), B=pair.A.transpose(-2, -1), layout=own)
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
    if one.scaling != other.scaling:
        return False
    turned = other.B.transpose(-2, -1), other.A.transpose(-2, -1)
    return any(
        torch.equal(one.A, A) and torch.equal(one.B, B) for A, B in ((other.A, other.B), turned)
    )


def _inject(
    model: nn.Module, wanted: _Wanted, adapter: str, dtype: torch.dtype | str | None
) -> None:
    """Put the file's adapter into the model as a new one."""
    drawn = plan(
        model, _targets(wanted), adapter=adapter, dtype=dtype, seed=0, parts=_parts(wanted) or None
    )
    own = {site.path: site for site in drawn.sites if not site.follows}
    values = {(f.target, f.prefix): (f.pair.A, f.pair.B) for f in wanted.pairs}
    shapes = {(path, spec.prefix): spec for path, site in own.items() for spec in site.specs}
    _check_shapes(shapes, values)
    in_full = {}
    if wanted.data.train_also:
        in_full = select_in_full(View(model), list(wanted.data.train_also))
    places, layers = wanted.places(), [site.module for site in drawn.sites]
    guess = "lora_only" if {module for module, _ in places} <= set(layers) else "all"
    bias = check_bias(wanted.data.bias or (guess if places else "none"))
    expected = bias if wanted.data.bias else "none"
    trained = in_place(model, layers, expected, [*in_full.values()])
    _check_tensors(model, trained, places)
    trained = dict.fromkeys(places, True) | trained
    complete: Plan = replace(drawn, bias=bias, train_also=in_full, in_place=trained)
    used = any(record.in_use for _, _, record in records_in(model))
    apply(complete, values, places, use=not used)


def _targets(wanted: _Wanted) -> dict[Pattern, dict[str, Any]]:
    """Patterns that select the file's layers by their paths, with their settings."""
    label = ", ".join(wanted.data.targets) or "loaded"
    groups: dict[tuple[Any, ...], set[str]] = {}
    for f in wanted.pairs:
        r, alpha = f.pair.rank, f.pair.known_alpha
        layout = f.pair.layout if f.pair.form == "experts" and f.pair.A.dim() == 3 else None
        groups.setdefault((r, alpha, f.pair.dropout, layout), set()).add(f.target)
    return {
        Pattern(label, _within(paths), by_name=True): {
            "r": r, "alpha": alpha, "dropout": dropout, "layout": layout,
        }
        for (r, alpha, dropout, layout), paths in groups.items()
    }  # fmt: skip


def _within(paths: set[str]) -> Predicate:
    return lambda path, _: path in paths


def _parts(wanted: _Wanted) -> dict[Pattern, tuple[tuple[str | None, int], ...]]:
    """The parts of fused projections, with what lies between them."""
    layers: dict[str, list[PairData]] = {}
    for f in wanted.pairs:
        if f.pair.part:
            layers.setdefault(f.target, []).append(f.pair)
    found = {}
    for path, pairs in layers.items():
        sizes: list[tuple[str | None, int]] = []
        end = 0
        for pair in sorted(pairs, key=lambda p: p.span[0]):
            if pair.span[0] > end:
                sizes.append((None, pair.span[0] - end))
            sizes.append((pair.part, pair.B.shape[0]))
            end = pair.span[0] + pair.B.shape[0]
        if pairs[0].span[1] > end:
            sizes.append((None, pairs[0].span[1] - end))
        found[Pattern(path, _within({path}), by_name=True)] = tuple(sizes)
    return found


def _check_shapes(
    wanted: Mapping[tuple[str, str], Any], given: Mapping[tuple[str, str], tuple[Tensor, Tensor]]
) -> None:
    """Refuse pairs that are not exactly those of the planned layers.

    Raises:
        FormatError: they are not, or hold values that are not finite.
    """
    names = {key: f"{key[0]} {key[1]}".rstrip("_ ") for key in {*wanted, *given}}
    problems: dict[str, Iterable[str]] = {
        "missing": (names[key] for key in wanted if key not in given),
        "unexpected": (names[key] for key in given if key not in wanted),
        "of another shape": (
            f"{names[key]} {tuple(A.shape)} and {tuple(B.shape)}, not {spec.A_shape} and "
            f"{spec.B_shape}"
            for key, (A, B) in given.items()
            if (spec := wanted.get(key)) is not None
            and (tuple(A.shape), tuple(B.shape)) != (spec.A_shape, spec.B_shape)
        ),
        "not finite": (names[key[:2]] for key in not_finite(_halves(given))),
    }
    _raise_problems("the file's A and B do not fit the model", problems)


def _halves(
    pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
) -> dict[tuple[str, str, str], Tensor]:
    return {(*key, x): t for key, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}


def _check_tensors(
    model: nn.Module, trained: Mapping[Place, bool], given: Mapping[Place, Tensor]
) -> None:
    paths = bare_paths(model)
    own = {place: own_tensor(*place) for place in {*trained, *given}}
    names = {place: f"{paths[place[0]]}.{place[1]}".lstrip(".") for place in own}
    saved = [p for p in trained if p[1] not in p[0]._non_persistent_buffers_set]
    _raise_problems(
        "what was trained in place does not fit the model",
        {
            "missing": (names[p] for p in saved if p not in given and own[p] is not None),
            "of another shape": (
                f"{names[p]} {tuple(value.shape)}, not {tuple(tensor.shape)}"
                for p, value in given.items()
                if (tensor := own[p]) is not None and tensor.shape != value.shape
            ),
            "not finite": (names[place] for place in not_finite(given)),
        },
    )


def _raise_problems(what: str, problems: Mapping[str, Iterable[str]]) -> None:
    lists = {problem: list(names) for problem, names in problems.items()}
    texts = [
        f"{len(names):,} {problem} ({', '.join(n[:200] for n in names[:3])}"
        + (", ...)" if names[3:] else ")")
        for problem, names in lists.items()
        if names
    ]
    if texts:
        raise FormatError(f"{what}: {'; '.join(texts)}.", remedy="Nothing was loaded.")
