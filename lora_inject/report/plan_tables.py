"""A plan as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_inject.core.choosing import Skip
from lora_inject.core.path_groups import grouped
from lora_inject.core.site import Site
from lora_inject.printing import REFUSED, TRAINS, Section, count, few, plural


def sites_section(plan: Any) -> Section:
    """One row for all layers that differ in nothing but the numbers in their paths."""
    rows = []
    for path, sites in grouped(plan.sites, lambda site: site.path, _texts):
        *texts, pattern = _texts(sites[0])
        total = count(sum(site.parameters for site in sites))
        rows.append((path, *texts, count(len(sites)), total, pattern))
    # With settings beside it, alpha is a text that can be wrapped.
    alpha = "?alpha" if any("," in row[4] for row in rows) else "?>alpha"
    notes = [f"{s.path} is also {', '.join(s.paths[1:])}" for s in plan.sites if len(s.paths) > 1]
    made = [s.path for s in plan.sites if s.multiplies and not s.compiles_products]
    if made:
        notes.append(f"In their weight under torch.compile, and not in products: {few(made, 1)}")
    return Section(
        f"Plan: adapter {plan.adapter!r} on {plural(len(plan.sites), 'layer')} of "
        f"{type(plan.model).__name__}, {count(plan.parameters)} parameters, bias={plan.bias!r}",
        ("~path", "layer", ">in x out", ">r", alpha, ">layers", ">parameters", "?chosen by"),
        rows,
        notes=notes,
        styles=[TRAINS] * len(rows),
    )


def _texts(site: Site) -> tuple[str, ...]:
    """What is said of a layer beside its path: layer, shape, r, alpha, pattern."""
    s = site.settings
    alpha = f"{s.alpha:g}" + (f", dropout {s.dropout:g}" if s.dropout else "")
    alpha += s.drops.text
    alpha += s.variant.text
    place = site.kind.in_products if site.multiplies else "in its weight"
    kind = site.type + (f" ({place})" if site.way == "weight" else "")
    parts = "+".join(spec.part for spec in site.specs if spec.part)
    kind += f" ({parts})" if parts else ""
    return kind, site.shape_text, f"{s.r}", alpha, site.pattern


def train_also_section(modules: Mapping[str, nn.Module]) -> Section:
    """The modules that train in full."""
    rows = [
        (path, type(module).__name__, count(sum(p.numel() for p in module.parameters())))
        for path, module in modules.items()
    ]
    columns = ("~path", "type", ">parameters")
    return Section("Train in full (train_also)", columns, rows, styles=[TRAINS] * len(rows))


def skipped_section(skips: Sequence[Skip]) -> Section:
    """What was selected and is left alone."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for skip in skips:
        groups.setdefault((skip.type, skip.pattern, skip.reason), []).append(skip.path)
    rows = [
        (few(paths, 1), kind, pattern, reason) for (kind, pattern, reason), paths in groups.items()
    ]
    columns = ("~path", "type", "?selected by", "why")
    return Section("Skipped", columns, rows, styles=[REFUSED] * len(rows))


def not_adapted(skips: Sequence[Skip]) -> list[str]:
    """A line for each reason for which what was wanted is left alone."""
    paths: dict[str, list[str]] = {}
    for skip in skips:
        paths.setdefault(skip.reason, []).append(skip.path)
    return [f"Not adapted: {few(left, 1)}: {why}" for why, left in paths.items()]
