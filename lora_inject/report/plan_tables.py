"""A plan as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_inject.core.choosing import Skip
from lora_inject.core.patterns import braces
from lora_inject.core.site import Site
from lora_inject.printing import Section, count, plural


def sites_section(plan: Any) -> Section:
    """One row for all layers that differ in nothing but the numbers in their paths."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in plan.sites:
        template = tuple(None if part.isdecimal() else part for part in site.path.split("."))
        s = site.settings
        alpha = f"{s.alpha:g}" + (f", dropout {s.dropout:g}" if s.dropout else "")
        alpha += s.drops.text
        alpha += s.variant.text
        kind = site.type + (" (in its weight)" if site.way == "weight" else "")
        parts = "+".join(spec.part for spec in site.specs if spec.part)
        kind += f" ({parts})" if parts else ""
        row = (kind, site.shape_text, f"{s.r}", alpha, site.pattern)
        groups.setdefault((template, row), []).append(site)
    rows = []
    for (_, (kind, shape, r, alpha, pattern)), sites in groups.items():
        path = _common_path([site.path for site in sites])
        total = count(sum(site.parameters for site in sites))
        rows.append((path, kind, shape, r, alpha, count(len(sites)), total, pattern))
    shared = [f"{s.path} is also {', '.join(s.paths[1:])}" for s in plan.sites if len(s.paths) > 1]
    return Section(
        f"Plan: adapter {plan.adapter!r} on {plural(len(plan.sites), 'layer')} of "
        f"{type(plan.model).__name__}, {count(plan.parameters)} parameters, bias={plan.bias!r}",
        ("path", "layer", ">in x out", ">r", ">alpha", ">layers", ">parameters", "chosen by"),
        rows,
        notes=shared,
    )


def _common_path(paths: Sequence[str]) -> str:
    """One path for several that differ in numbers only: 'layers.{0..31}.mlp'."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    merged = [c[0] if len(set(c)) == 1 else braces(map(int, set(c))) for c in columns]
    return ".".join(merged) or "(the model itself)"


def train_also_section(modules: Mapping[str, nn.Module]) -> Section:
    """The modules that train in full."""
    rows = [
        (path, type(module).__name__, count(sum(p.numel() for p in module.parameters())))
        for path, module in modules.items()
    ]
    return Section("Train in full (train_also)", ("path", "type", ">parameters"), rows)


def skipped_section(skips: Sequence[Skip]) -> Section:
    """What was selected and is left alone."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for skip in skips:
        groups.setdefault((skip.type, skip.pattern, skip.reason), []).append(skip.path)
    rows = [
        (paths[0] + (f" and {len(paths) - 1} more" if paths[1:] else ""), kind, pattern, reason)
        for (kind, pattern, reason), paths in groups.items()
    ]
    return Section("Skipped", ("path", "type", "selected by", "why"), rows)
