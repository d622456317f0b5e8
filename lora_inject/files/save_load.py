"""Save an adapter to disk and load it into a model, in any format; strict, and all or nothing."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adaptation import Content
from lora_inject.core.in_place import in_place
from lora_inject.core.look import Look
from lora_inject.core.paths import first_paths
from lora_inject.core.patterns import Pattern, Predicate
from lora_inject.core.request import Request, rows_by_pattern, settings_by_pattern
from lora_inject.core.site import Site
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files.fit_checks import require_fit
from lora_inject.files.formats import named_format, read_adapter
from lora_inject.files.formats.data import PairData
from lora_inject.files.layout import Layout
from lora_inject.files.portable import PortableReport
from lora_inject.files.portable import portable as as_plain_lora
from lora_inject.files.rows import values_for, values_of_tables
from lora_inject.files.stored import Stored
from lora_inject.own import Place, own_tensor
from lora_inject.plan import plan_for
from lora_inject.settings import check_adapter, check_bias, check_count, check_dtype
from lora_inject.sharding import is_distributed, on_first_rank
from lora_inject.starts import Saved
from lora_inject.variants import SCALINGS, name_prefix


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    format: str = "peft",
    portable: bool = False,
    r: int | None = None,
    error: float = 0.0,
) -> PortableReport | None:
    """Save an adapter: A, B, and the biases and modules that it trained.

    The default is a PEFT directory, which PEFT, vLLM and diffusers read. A save that is interrupted
    leaves the files that were there. Of a sharded model all ranks must call this; what is the
    adapter's is gathered, and the first rank writes.

    Example:
        >>> save(model, "adapter")  # doctest: +SKIP

    Args:
        model: an adapted model, or a wrapper that holds it.
        path: a directory for "peft" and "diffusers", a file for the others; made if need be.
        adapter: the adapter's name; None for the only one there is, or the only one in use.
        format: "peft", "loralib" (a .pt file), "kohya" or "diffusers".
        portable: write a plain LoRA with one rank and a scaling of 1 for all layers, for readers
            that know nothing else (vLLM, llama.cpp): ranks are padded with zeros, scalings folded
            into B, and what is no product of low rank (DoRA) becomes the best one of rank r.
        r: for ``portable``, the largest rank to write; None writes all of it, where it has a rank.
        error: how much of the change of a weight may be lost by that, relative to its norm.

    Returns:
        What was lost, weight by weight, where ``portable``; else None.

    Raises:
        ArgumentError: the format or the adapter is not known.
        FormatError: the format has no word for something of the adapter, or the path cannot be
            written to. Nothing has been written then.
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    writer = named_format(format, "format")
    file, stored = _path(path), Stored(model, adapter)
    data = stored.data()
    report = None
    if portable:
        data, report = as_plain_lora(
            stored, data, None if r is None else check_count(r, "r"), error
        )
    elif r is not None or error:
        raise ArgumentError("r and error are for portable=True.")
    write = partial(writer.write, data, file)
    if any(is_distributed(tensor) for tensor in stored.tensors().values()):
        on_first_rank(write)
    else:
        write()
    return report


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
    file = _path(path)
    look = Look(model)
    look.require_awake()
    data = read_adapter(file, format, model, alpha)
    wanted = Layout(look, data)
    if not other_base:
        wanted.check_base()
    if adapter in look.known:
        stored = Stored(model, adapter, look)
        if data.bias:
            stored.check_bias(check_bias(data.bias))
        pairs = wanted.pairs_by_key | values_for(stored.pairs, wanted.rows)
        stored.fill({**wanted.tensors, **pairs}, wanted.scalings)
        return model
    used = bool(look.used)
    _inject(wanted, adapter, dtype, use=not used)
    return model


def _path(path: Any) -> Path:
    try:
        return Path(fspath(path))
    except TypeError as error:
        raise ArgumentError(f"path must be a path, not {path!r}.") from error


def _inject(wanted: Layout, adapter: str, dtype: torch.dtype | str | None, use: bool) -> None:
    """Put the file's adapter into the model as a new one."""
    wanted.require_tied()
    elsewhere = wanted.elsewhere()
    outside = (Pattern("elsewhere", _within(elsewhere), by_name=True),) if elsewhere else ()
    request = Request(
        settings_by_pattern(_targets(wanted), {}) if wanted.pairs else {},
        rows=rows_by_pattern({rows.pattern: rows.data.ids for rows in wanted.rows}),
        excluded=outside,
        parts=_parts(wanted),
        dtype=check_dtype(dtype),
        seed=0,
        adapter=adapter,
    )
    plan_for(wanted.look, request, partial(_content, wanted, use)).apply()


def _content(wanted: Layout, use: bool, sites: Sequence[Site]) -> Content:
    """What the file holds for the sites.

    Raises:
        FormatError: it does not fit them.
    """
    for site in sites:
        if site.kind.weight(site.module, site.specs[0].weight).is_meta:
            raise FormatError(
                "it is on the meta device, where nothing can be loaded.",
                path=site.path,
                remedy='Call model.to_empty(device="cpu") and load the base weights first.',
            )
    values = _values(wanted, {site.path: site for site in sites if not site.follows})
    places, layers = wanted.places(), [site.module for site in sites]
    in_full = _in_full(wanted, places)
    guess = "lora_only" if {module for module, _ in places} <= set(layers) else "all"
    all_biases = all(name.endswith("bias") for _, name in places)
    bias = check_bias(wanted.data.bias or (guess if places and all_biases else "none"))
    expected = bias if wanted.data.bias else "none"
    trained = in_place(wanted.look, layers, expected, [*in_full.values()])
    _check_tensors(wanted, trained, places)
    return Content(bias, in_full, dict.fromkeys(places, True) | trained, values, places, use)


def _values(wanted: Layout, sites: Mapping[str, Site]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The tensors by path and prefix of each pair, all that the sites need and no others."""
    values = values_of_tables(wanted.rows)
    for f in wanted.pairs:
        own = f.pair.tensors
        if (site := sites.get(f.target)) is not None:
            variant = site.settings.variant
            own = {role: t.to(variant.dtype(role, site.dtype)) for role, t in own.items()}
        values[f.target, name_prefix(f.pair.weight, f.pair.part)] = own
    shapes = {
        f"{path}.{spec.prefix}lora_{role}": shape
        for path, site in sites.items()
        for spec in site.specs
        for role, shape in site.settings.variant.shapes(spec).items()
        if role not in site.settings.variant.derived
    }
    given = {
        f"{path}.{prefix}lora_{role}": tensor
        for (path, prefix), own in values.items()
        for role, tensor in own.items()
    }
    require_fit("the file's A and B do not fit the model", shapes, given)
    return values


def _in_full(wanted: Layout, places: Mapping[Place, Tensor]) -> dict[str, nn.Module]:
    """The modules of the file that train in full, by path."""
    paths, data = first_paths(wanted.modules), wanted.data
    if not data.bias:  # a file that says no more than its tensors
        owners = {module for module, name in places if not name.endswith("bias")}
        return {path: module for module, path in paths.items() if module in owners}
    own = data.facts.get("train_also")
    return {
        path: module
        for module, path in paths.items()
        if (path in own if own is not None else path.endswith(data.train_also))
    }


def _targets(wanted: Layout) -> dict[Pattern, dict[str, Any]]:
    """Patterns that select the file's layers by their paths, with their settings."""
    label = ", ".join(wanted.data.targets) or "loaded"
    groups: dict[tuple[Any, ...], set[str]] = {}
    for f in wanted.pairs:
        pair = f.pair
        # That of the start counts in the file's rank, and so in its alpha.
        r, rule = pair.own_rank, SCALINGS[pair.rule]
        alpha = rule.alpha(pair.scaling, r) if pair.start else pair.known_alpha
        layout = pair.layout if pair.form == "experts" and pair.A.dim() == 3 else None
        key = (r, alpha, pair.dropouts, layout, pair.rule, pair.fixed or None, pair.variant)
        groups.setdefault((*key, pair.start), set()).add(f.target)
    return {
        Pattern(label, _within(paths), by_name=True): {
            "r": r, "alpha": alpha, "dropout": dict(dropouts), "layout": layout, "scaling": rule,
            "fixed": fixed, "variant": variant, "init": Saved(start) if start else "default",
        }
        for (r, alpha, dropouts, layout, rule, fixed, variant, start), paths in groups.items()
    }  # fmt: skip


def _within(paths: set[str]) -> Predicate:
    return lambda path, _: path in paths


def _parts(wanted: Layout) -> dict[Pattern, tuple[tuple[str | None, int], ...]]:
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


def _check_tensors(
    wanted: Layout, trained: Mapping[Place, bool], given: Mapping[Place, Tensor]
) -> None:
    """Refuse values that are not those of what trains in place, in the dtypes that it has."""
    paths, shapes, values = first_paths(wanted.modules), {}, {}
    for place in {*trained, *given}:
        module, name = place
        tensor, key = own_tensor(module, name), f"{paths[module]}.{name}".lstrip(".")
        if tensor is None:
            continue
        if place in given:
            values[key] = given[place].to(tensor.dtype)
        if place in given or name not in module._non_persistent_buffers_set:
            shapes[key] = tuple(tensor.shape)
    require_fit("what was trained in place does not fit the model", shapes, values)
