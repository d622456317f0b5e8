"""A file's adapter put into a model as a new one: a plan with values in place of a start."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adaptation import Content
from lora_inject.core.in_place import in_place
from lora_inject.core.paths import first_paths
from lora_inject.core.patterns import Pattern, Predicate
from lora_inject.core.request import Request, rows_by_pattern, settings_by_pattern
from lora_inject.core.site import Site
from lora_inject.errors import FormatError, warn
from lora_inject.files.fit_checks import require_fit
from lora_inject.files.formats.data import PairData
from lora_inject.files.layout import Layout
from lora_inject.files.rows import values_of_tables
from lora_inject.kinds import find_kind
from lora_inject.own import Place, own_tensor
from lora_inject.plan import Plan, plan_for
from lora_inject.printing import few
from lora_inject.settings import check_bias, check_dtype
from lora_inject.starts import Saved
from lora_inject.variants import SCALINGS, VARIANTS, name_prefix


def plan_to_put_in(
    wanted: Layout, adapter: str, dtype: torch.dtype | str | None, use: bool
) -> Plan:
    """What puts the file's adapter into the model as a new one."""
    elsewhere = wanted.elsewhere()
    outside = (Pattern("elsewhere", _within(elsewhere), by_name=True),) if elsewhere else ()
    request = Request(
        settings_by_pattern(_targets(wanted), {}) if wanted.pairs else {},
        rows=rows_by_pattern({table.pattern: table.data.ids for table in wanted.tables}),
        excluded=outside,
        parts=_parts(wanted),
        dtype=_dtype(wanted, dtype),
        seed=0,
        adapter=adapter,
        dropout_can_go=True,
    )
    return plan_for(wanted.look, request, partial(_content, wanted, use))


def _dtype(wanted: Layout, dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """What was asked for, else what the file says, where the base has such a dtype."""
    if dtype is not None or wanted.data.dtype != "base":
        return check_dtype(dtype)
    known = [(find_kind(f.module), f.module, f.pair.weight) for f in wanted.pairs]
    weights = [kind.weight(m, name) if kind else own_tensor(m, name) for kind, m, name in known]
    usable = all(w is not None and w.is_floating_point() and w.dtype.itemsize > 1 for w in weights)
    return "base" if usable else None


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
    _warn_of_dropout(wanted, sites)
    values = _values(wanted, {site.path: site for site in sites if not site.follows})
    places, layers = wanted.places, [site.module for site in sites]
    in_full = _in_full(wanted, places)
    guess = "lora_only" if {module for module, _ in places} <= set(layers) else "all"
    all_biases = all(name.endswith("bias") for _, name in places)
    bias = check_bias(wanted.data.bias or (guess if places and all_biases else "none"))
    expected = bias if wanted.data.bias else "none"
    trained = in_place(wanted.look, layers, expected, [*in_full.values()])
    # What a format that tells what trains does not name is of the base, and only comes along.
    all_of_it = trained if wanted.data.bias else dict.fromkeys(places, True) | trained
    wanted.require_tied(all_of_it)
    _check_tensors(wanted, trained, places)
    also = dict.fromkeys(places, False) | all_of_it
    said = json.dumps(dict(wanted.data.said)) if wanted.data.said else ""
    beside, base = frozenset(wanted.data.beside), wanted.base
    return Content(bias, in_full, also, values, places, use, beside, said, base=base)


def _warn_of_dropout(wanted: Layout, sites: Sequence[Site]) -> None:
    """Say which layers train without the dropout that the file has for them."""
    without = {site.path for site in sites if not site.has_input}
    lost = [f for f in wanted.pairs if f.target in without and f.pair.dropout]
    if lost:
        names, dropout = [f.pair.name for f in lost], lost[0].pair.dropout
        warn(
            f"{few(names, 1)}: the file has a dropout of {dropout:g}, and the adapter "
            "acts in the weight here, where it has no input to act on: it is left out."
        )


def _values(wanted: Layout, sites: Mapping[str, Site]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The tensors by path and prefix of each pair, all that the sites need and no others."""
    values = values_of_tables(wanted.tables)
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
        layout = (pair.layout or None) if pair.form == "experts" and pair.A.dim() == 3 else None
        key = (r, alpha, pair.dropouts, layout, pair.rule, pair.fixed or None)
        variant = VARIANTS[pair.variant].of(pair.tensors)
        groups.setdefault((*key, variant, pair.start), set()).add(f.target)
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
        if (value := given.get(place)) is not None:
            if value.is_complex() != tensor.is_complex():
                raise FormatError(f"{key} is {value.dtype} in the file and {tensor.dtype} in here.")
            values[key] = value.to(tensor.dtype)
        if place in given or name not in module._non_persistent_buffers_set:
            shapes[key] = tuple(tensor.shape)
    require_fit("what was trained in place does not fit the model", shapes, values)
