"""Adapters of any variant as plain LoRA, for readers that know nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.low_rank import difference_norm, product_norm, truncated
from lora_inject.compat.conversions import is_of_transformers
from lora_inject.compat.marks import sizes_of
from lora_inject.errors import FormatError, warn
from lora_inject.files.checkpoint_names import as_in_checkpoint
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import as_portable
from lora_inject.files.packed import with_partners
from lora_inject.files.stored import Stored
from lora_inject.files.stored_pair import StoredPair
from lora_inject.printing import Section, Shown, Tables, few
from lora_inject.sharding import whole
from lora_inject.variants import Change

_ROUNDING = 1e-5  # what float32 loses, relative to the change


class PortableWeight(NamedTuple):
    """One change of a weight as it is written.

    Attributes:
        path: the weight's path.
        r: the rank that it is written with.
        lost: the norm of what that rank cannot hold, relative to the change's.
    """

    path: str
    r: int
    lost: float


@dataclass(frozen=True, repr=False)
class PortableReport(Shown):
    """What ``save(portable=True)`` wrote, weight by weight; ``print`` shows it as a table."""

    weights: tuple[PortableWeight, ...]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max(weight.lost for weight in self.weights)

    def _tables(self) -> Tables:
        rows = [(w.path, str(w.r), f"{w.lost:.2%}") for w in self.weights]
        title = f"Plain LoRA of {len(rows)} weights"
        return Tables([Section(title, ("~weight", ">r", ">lost"), rows)])


def portable(
    stored: Stored, data: AdapterData, r: int | None, error: float
) -> tuple[AdapterData, PortableReport]:
    """The same adapter with one rank and a scaling of 1 everywhere, and no variants.

    Args:
        stored: the adapter in its model.
        data: the same apart from it.
        r: the rank; None for the smallest that holds everything.
        error: how much of a change may be lost.

    Raises:
        FormatError: a change is of no low rank and none was given, or more of it would be lost.
    """
    data.require_no_rows("a plain LoRA")
    pairs, shown = [], []
    for held, pair in zip(stored.in_order(), data.pairs, strict=True):
        lost = 0.0
        if not held.variant.additive or (r is not None and pair.rank > r):
            pair, lost = _plain(held, pair, r)
        pairs.append(pair)
        shown.append(PortableWeight(pair.name, pair.rank, lost))
    report = PortableReport(tuple(shown))
    _require_error(shown, error)
    return as_portable(replace(data, pairs=tuple(pairs))), report


def for_readers(
    data: AdapterData,
    format: str,
    portable: bool,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
) -> AdapterData:
    """An adapter by the names of the model's checkpoint, for readers that know these alone.

    Args:
        data: an adapter by the names of the model.
        format: what it is written in. GGUF's names are made of the checkpoint's.
        portable: whether it is for engines, which in PEFT's format have the checkpoint's names, and
            want all of what they read as one.
        model: the model, without wrappers.
        modules: its modules by path.
    """
    if format == "gguf":
        return replace(as_in_checkpoint(data, model, modules), sizes=sizes_of(model))
    if format == "peft" and portable:
        _warn_of_unknown_experts(data, model)
        return as_in_checkpoint(with_partners(data, modules), model, modules)
    return data


def _warn_of_unknown_experts(data: AdapterData, model: nn.Module) -> None:
    """Warn of experts that stay one tensor in a model that does not say how checkpoints have it."""
    fused = [pair.name for pair in data.pairs if pair.form == "experts" and pair.A.dim() == 3]
    if fused and not is_of_transformers(model):
        warn(
            f"{few(fused)}: the file has all experts of a layer in one. Engines read them one by "
            f"one, by names that {type(model).__name__} cannot tell, which is no model of "
            "transformers: for these, inject into that model itself, inside of it, and save that."
        )


@torch.no_grad()
def _plain(held: StoredPair, pair: PairData, r: int | None) -> tuple[PairData, float]:
    """A pair as a product of the rank that it has, or the best one of rank r, and what that lost.

    Raises:
        FormatError: it has no low rank, and none was given; or it is not finite.
    """
    kind, layer, variant, s = held.adapter.kind, held.layer, held.variant, held.adapter.settings
    own = held.oriented({role: whole(tensor.detach()) for role, tensor in held.tensors.items()})
    wide = {role: t.to(torch.promote_types(t.dtype, torch.float32)) for role, t in own.items()}
    exact = variant.low_rank(kind, layer, wide)
    if exact is None and r is None:
        raise FormatError(
            f"{pair.name} is a {pair.variant}, which is no product of low rank.",
            remedy="Say the rank to write it with, and how much may be lost: r=16, error=0.1.",
        )
    if exact is None:
        W = whole(kind.weight(layer, held.spec.weight)).to(wide["A"].dtype)
        change = Change(held.spec, wide, s.scaling, s.scaling)
        exact = variant.full_rank(kind, layer, W, change)
    else:
        exact = exact[0], exact[1] * s.scaling
    if not all(tensor.isfinite().all() for tensor in exact):
        raise FormatError(f"{pair.name} is not finite.")
    made: tuple[Tensor, Tensor] = exact
    lost, rank = 0.0, exact[0].shape[-2]
    if r is not None and rank > r:
        made, rank = truncated(*exact, r), r
        norm = product_norm(*exact)
        lost = difference_norm(exact, made) / norm if norm else 0.0
    A, B = (t.to(o.dtype) for t, o in zip(made, (own["A"], own["B"]), strict=True))
    A, B = kind.from_matrices(layer, A, B)
    if pair.layout and held.spec.experts and pair.A.shape[-1] != A.shape[-1]:
        A, B = B.transpose(-2, -1), A.transpose(-2, -1)  # as others read it
    plain = replace(
        pair, A=A.contiguous(), B=B.contiguous(), alpha=float(rank), rule="lora", variant="lora",
        others={}, start="", r=0, kernel=(),
    )  # fmt: skip
    return plain, lost


def _require_error(weights: Sequence[PortableWeight], error: float) -> None:
    wrong = [weight for weight in weights if weight.lost > max(error, _ROUNDING)]
    if wrong:
        worst = max(wrong, key=lambda weight: weight.lost)
        raise FormatError(
            f"{len(wrong)} of {len(weights)} weights would lose more than {error:.2%} of their "
            f"change, {worst.path} {worst.lost:.2%}.",
            remedy=f"Use a larger r, or say error={worst.lost + 0.005:.2f} or more.",
        )
