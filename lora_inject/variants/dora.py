"""DoRA (arXiv 2402.09353): the length of each row of the adapted weight is trained on its own.

With ``V = W + s B A`` and the length of its rows ``n``, through which no gradient flows (section
4.3), the weight is ``diag(m / n) V``, and m starts as the lengths of the rows of W.

The lengths are made without V, of ``n^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B`` row by row:
products as narrow as the rank. In float32, whatever the layer computes in. At the start every term
but the first is exactly zero, so that n is m to the last bit, and no output changes.

Rows are those of output features, whatever the layer: of a convolution all that a channel reads, of
an embedding one feature of every token. Shapes: O out features, I in features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.product import without_autocast
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant


@dataclass(frozen=True)
class DoRA(Variant):
    """``diag(m / n) (W + s B A) - W``."""

    name = "dora"
    more = ("magnitude",)
    additive = False
    finishes = True
    peft = {"use_dora": True}  # noqa: RUF012 (a constant of the class)
    keys = {"magnitude": "lora_magnitude_vector"}  # noqa: RUF012

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The magnitude is (out,), of experts (E, out)."""
        experts = (spec.experts,) if spec.experts else ()
        return {**super().shapes(spec), "magnitude": (*experts, spec.n_out)}

    def dtype(self, role: str, dtype: torch.dtype) -> torch.dtype:
        """At least float32 for the magnitude: rounded, it would move the base."""
        return torch.promote_types(dtype, torch.float32) if role == "magnitude" else dtype

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """Where the rows of the weight cannot be known, or stand the other way round."""
        if spec.swapped:
            return "DoRA scales rows, which are columns here. Untie them or use variant='lora'."
        if beside and (reason := kind.affine_refusal(layer)):
            return f"{reason} DoRA needs to know what it does: use how='weight', or variant='lora'."
        return super().refusal(kind, layer, spec, beside, dropout)

    def starting(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec,
        tensors: Mapping[str, Tensor], scaling: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The lengths of the rows as they are."""
        assert W is not None
        change = Change(spec, tensors, scaling, scaling)
        return {"magnitude": self.lengths(kind, layer, W, change)}

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """It changes rows of full rank."""
        return None

    @torch.no_grad()
    def lengths(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """The lengths of the rows of ``W + s B A``: (out,), or (E, out)."""
        pairs = [(c.tensors["A"], c.tensors["B"])]
        if self.offset:
            pairs.append((c.tensors["A0"], c.tensors["B0"]))
        with without_autocast(W.device.type):
            W_OI = _rows(kind, layer, W, c.spec)
            wide = torch.promote_types(W.dtype, torch.float32)
            # A follows W, which is never copied to another dtype.
            factors = [kind.to_matrices(layer, A.to(wide), B.to(wide)) for A, B in pairs]
            mixed = [((W_OI @ A.to(W.dtype).mT).to(wide) * B).sum(-1) for A, B in factors]
            own = [[((B @ (A @ C.mT)) * D).sum(-1) for C, D in factors] for A, B in factors]
            cross, square = mixed[0], own[0][0]
            if self.offset:  # in an order in which equal ones cancel exactly
                cross = mixed[0] - mixed[1]
                square = (own[0][0] - own[0][1]) + (own[1][1] - own[1][0])
            squares = torch.linalg.vector_norm(W_OI, dim=-1, dtype=wide).square()
            squares = squares + (2 * c.scaling * cross + c.scaling**2 * square)
        lengths = squares.clamp_min(0).sqrt()
        return cast("Tensor", lengths if c.spec.experts else lengths.flatten())

    def ratio(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """``m / n``; a row of zeros stays one."""
        n = self.lengths(kind, layer, W, c)
        return c.tensors["magnitude"] / n.clamp_min(torch.finfo(n.dtype).tiny)

    def add_to_output(
        self, kind: LayerKind, layer: nn.Module, x: Tensor, former: Tensor, y: Tensor, c: Change
    ) -> Tensor:
        """``m / n`` of what the weight makes of x is added, less what the layer computed.

        The bias is not scaled, and dropout acts on the input of A alone.
        """
        W = cast("Tensor", getattr(layer, c.spec.weight))
        f = kind.beside_output(layer, self.ratio(kind, layer, W, c))
        own = former.narrow(-1, c.spec.start, c.spec.n_out) if c.spec.part else former
        wide = torch.promote_types(own.dtype, f.dtype)
        delta = self.delta(kind, layer, x, former, c).to(wide) * c.scaling
        product, bias = own.to(wide), kind.bias(layer, c.spec)
        if bias is not None:
            product = product - kind.beside_output(layer, bias)
        change = torch.addcmul(delta, f - 1, product + delta)
        return _added(y, change, c)

    def finish(self, kind: LayerKind, layer: nn.Module, y: Tensor, c: Change) -> Tensor:
        """``m / n`` of all but the bias."""
        W = cast("Tensor", getattr(layer, c.spec.weight))
        more, bias = self.ratio(kind, layer, W, c) - 1, kind.bias(layer, c.spec)
        own = y.narrow(-1, c.spec.start, c.spec.n_out) if c.spec.part else y
        product = own if bias is None else own - bias
        if c.spec.part or y.dtype != more.dtype:
            return _added(y, more * product, c)
        return torch.addcmul(y, more, product)

    def add_to_weight(
        self, kind: LayerKind, layer: nn.Module, W: Tensor, total: Tensor, c: Change
    ) -> Tensor:
        """``diag(m / n) V - W`` is added."""
        f = self.ratio(kind, layer, W, c)
        update = self.update(kind, layer, W, c) * c.scaling
        V = kind.to_matrix(layer, W + update)
        if c.spec.part:
            outside = V.shape[-2] - c.spec.start - c.spec.n_out
            f = nn.functional.pad(f, (c.spec.start, outside), value=1.0)
        f = f.reshape(*V.shape[:-1], 1)
        return total + (update + kind.from_matrix(layer, (f - 1) * V, W.shape)) * c.weight


def _rows(kind: LayerKind, layer: nn.Module, W: Tensor, spec: Spec) -> Tensor:
    """The rows of the weight that a pair is for: (..., out, in)."""
    W_OI = kind.to_matrix(layer, W)
    return W_OI.narrow(-2, spec.start, spec.n_out) if spec.part else W_OI


def _added(y: Tensor, change: Tensor, c: Change) -> Tensor:
    """``y + weight * change``, rounded once."""
    if isinstance(c.weight, Tensor) or c.weight != 1:
        change = change * c.weight
    if c.spec.part:
        after = y.shape[-1] - c.spec.start - c.spec.n_out
        change = nn.functional.pad(change, (c.spec.start, after))
    return (y.to(change.dtype) + change).to(y.dtype)
