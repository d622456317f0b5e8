"""A LoRA out of a full fine-tune: the difference of two models, truncated to a low rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.adapters.extracting import EXTRACTING, Extracting, factors
from lora_inject.core.adaptation import Content
from lora_inject.core.index import Index
from lora_inject.core.layer import LoRALayer
from lora_inject.core.look import Look
from lora_inject.core.patterns import Targets
from lora_inject.core.request import ALL_LINEAR, Request, optional_patterns, settings_by_pattern
from lora_inject.core.site import Site
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.own import own_tensor
from lora_inject.plan import plan_for
from lora_inject.printing import REFUSED, Section, Shown, Tables
from lora_inject.settings import check_adapter, check_dtype, check_layers, check_word
from lora_inject.sharding import is_partial
from lora_inject.variants import Spec


class ExtractedWeight(NamedTuple):
    """One weight of which the difference was extracted.

    Attributes:
        path: its path.
        r: the rank.
        lost: the norm of what the rank could not hold, relative to that of the difference; 0 where
            the models do not differ.
    """

    path: str
    r: int
    lost: float


@dataclass(frozen=True, repr=False)
class ExtractReport(Shown):
    """What ``extract`` found, weight by weight; ``print`` shows it as a table.

    Attributes:
        weights: the extracted weights.
        others: names of parameters and buffers that differ too, and that the adapter does not hold.
    """

    weights: tuple[ExtractedWeight, ...]
    others: tuple[str, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max(weight.lost for weight in self.weights)

    def _tables(self) -> Tables:
        rows = [(weight.path, str(weight.r), f"{weight.lost:.2%}") for weight in self.weights]
        sections = [Section(f"Extracted {len(rows)} weights", ("~weight", ">r", ">lost"), rows)]
        if self.others:
            title = f"Differ too and are not in the adapter: {len(self.others)}"
            sections.append(
                Section(title, (), (), notes=self.others, styles=[REFUSED] * len(self.others))
            )
        return Tables(sections)


def extract(
    base: nn.Module,
    tuned: nn.Module,
    targets: Targets = ALL_LINEAR,
    r: int = 8,
    *,
    variant: str = "lora",
    exclude: Any = (),
    layers: Any = None,
    dtype: torch.dtype | str | None = None,
    adapter: str = "default",
) -> ExtractReport:
    """Adapt a base model so that it computes what a full fine-tune of it does, as near as r allows.

    Of each weight's difference A and B are the truncated singular value decomposition, randomized
    (arXiv 0909.4061) and the same at every call.

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> tuned = nn.Sequential(nn.Linear(8, 8))
        >>> _ = tuned.load_state_dict(base.state_dict())
        >>> with torch.no_grad():
        ...     _ = tuned[0].weight.add_(torch.outer(torch.ones(8), torch.arange(8.0)))
        >>> round(extract(base, tuned, "0", r=1).worst, 4)
        0.0

    Args:
        base: the model from before; it gets the adapter, in place.
        tuned: the fine-tuned model, of the same layers; it is not changed.
        targets: the layers to extract, as in ``inject``.
        r: the rank.
        variant: "lora", or "dora", which scales the rows besides and so loses less.
        exclude: layers to leave out.
        layers: block indices to keep.
        dtype: of A and B, as in ``inject``.
        adapter: the adapter's name.

    Returns:
        How much of each difference the rank could not hold, and what else differs.

    Raises:
        ArgumentError: an argument cannot be used, or a weight of the base is not, or not in its
            shape, in ``tuned``.
        NoMatchError: a pattern selects nothing.
        UnsupportedLayerError: a selected layer cannot be adapted.
    """
    look = Look(base)
    for name, modules in (("base", look.index.modules), ("tuned", Index(tuned).modules)):
        if any(isinstance(module, LoRALayer) for module in modules):
            raise ArgumentError(
                f"{name}: it has adapters in use, which would be taken for its weights.",
                remedy="Call use(model) or strip(model) first.",
            )
    request = Request(
        settings_by_pattern(
            targets, {"r": r, "variant": check_word(variant, "variant", EXTRACTING)}
        ),
        excluded=optional_patterns(exclude, "exclude"),
        layers=check_layers(layers),
        dtype=check_dtype(dtype),
        seed=0,
        adapter=check_adapter(adapter),
    )
    reports: list[ExtractReport] = []

    def content(sites: Sequence[Site]) -> Content:
        values, report = _difference(look, tuned, [site for site in sites if not site.follows], r)
        reports.append(report)
        return Content(values=values)

    plan_for(look, request, content).apply()
    return reports[0]


def _difference(
    look: Look, tuned: nn.Module, sites: Sequence[Site], r: int
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], ExtractReport]:
    """The tensors by path and prefix of each pair, and what they could not hold."""
    index = look.index
    tuned_weights = [_tuned_weights(index.path(site.module), site, tuned) for site in sites]
    values, found, held = {}, [], set[int]()
    for site, weights in zip(sites, tuned_weights, strict=True):
        for spec in site.specs:
            W = site.kind.weight(site.module, spec.weight)
            how = EXTRACTING[site.settings.variant.name]
            own, lost = _extracted(site, spec, W, weights[spec.weight], how)
            held.add(id(W))
            values[site.path, spec.prefix] = own
            found.append(ExtractedWeight(index.path(site.module, spec.weight), r, lost))
    others = tuple(_others(look.model, tuned, {weight.path for weight in found}, held))
    return values, ExtractReport(tuple(found), others)


def _tuned_weights(path: str, site: Site, tuned: nn.Module) -> dict[str, Tensor]:
    """The weights of a site, whose module is at that path, in the fine-tuned model.

    Raises:
        ArgumentError: one is not there, has another shape, or is packed.
        UnsupportedLayerError: one is sharded.
    """
    try:
        module = tuned.get_submodule(path)
    except AttributeError as error:
        raise ArgumentError("tuned: it has no such module.", path=site.path) from error
    weights = {}
    for spec in site.specs:
        own, other = site.kind.weight(site.module, spec.weight), own_tensor(module, spec.weight)
        if other is None or other.shape != own.shape or not other.is_floating_point():
            shape = None if other is None else tuple(other.shape)
            raise ArgumentError(
                f"tuned: its {spec.weight} has the shape {shape}, not {tuple(own.shape)}.",
                path=site.path,
            )
        if not own.is_floating_point() or own.is_meta or other.is_meta:
            raise ArgumentError(
                f"base: its {spec.weight} has no values to compare.", path=site.path
            )
        if is_partial(own) or is_partial(other):
            raise UnsupportedLayerError(
                f"its {spec.weight} is sharded, and no rank holds it whole.",
                path=site.path,
                remedy="Extract from models that are not sharded.",
            )
        weights[spec.weight] = other
    return weights


@torch.no_grad()
def _extracted(
    site: Site, spec: Spec, W: Tensor, tuned: Tensor, how: Extracting
) -> tuple[dict[str, Tensor], float]:
    """The tensors by role, and the share of the difference that they do not hold."""
    dtype, r = torch.promote_types(W.dtype, torch.float32), site.settings.r
    W_OI = site.kind.to_matrix(site.module, W.to(dtype))
    T_OI = site.kind.to_matrix(site.module, tuned.to(W.device, dtype))
    rank = min(r, *W_OI.shape[-2:])
    if not (T_OI - W_OI).isfinite().all():
        raise ArgumentError("the difference of the models is not finite.", path=site.path)
    pair = how.pair(W_OI, T_OI, lambda matrix_OI: factors(matrix_OI, rank, site.path))
    A, B = (tensor.to(site.dtype) for tensor in pair)
    change, own = how.made(W_OI, T_OI, B.to(dtype) @ A.to(dtype))
    norm = (T_OI - W_OI).norm().item()
    lost = (T_OI - W_OI - change).norm().item() / norm if norm else 0.0
    A = nn.functional.pad(A, (0, 0, 0, r - rank))
    B = nn.functional.pad(B, (0, r - rank))
    A, B = site.kind.from_matrices(site.module, A, B)
    shapes = site.settings.variant.shapes(spec)
    return {"A": A, "B": B, **{role: t.reshape(shapes[role]) for role, t in own.items()}}, lost


def _others(
    base: nn.Module, tuned: nn.Module, extracted: set[str], held: set[int]
) -> Iterable[str]:
    """Names of tensors that differ and are not extracted, under any name of theirs."""
    state, own = tuned.state_dict(), base.state_dict(keep_vars=True)
    by_id = {id(own[name]): name for name in extracted if name in own}
    for name, tensor in own.items():
        other = state.get(name)
        if id(tensor) in held:  # tied to what is extracted: it should be so in tuned too
            leader = state.get(by_id.get(id(tensor), name))
            if other is None or leader is None or not torch.equal(other, leader):
                yield name
            continue
        same = other is not None and other.shape == tensor.shape
        if name not in extracted and not (
            same and torch.equal(tensor, other.to(tensor.device, tensor.dtype))  # type: ignore[union-attr]
        ):
            yield name
