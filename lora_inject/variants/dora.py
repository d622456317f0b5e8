"""DoRA (arXiv 2402.09353): the length of each row of the adapted weight is trained on its own.

With ``V = W + s B A`` and the length of its rows ``n``, through which no gradient flows (section
4.3), the weight is ``diag(m / n) V``, and m starts as the lengths of the rows of W.

The lengths are made without V, of ``n^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B`` row by row:
products as narrow as the rank. In float32, whatever the layer computes in. At the start every term
but the first is exactly zero, so that n is m to the last bit, and no output changes.

Rows are those of output features, whatever the layer: of a convolution all that a channel reads, of
an embedding one feature of every token. Shapes: O out features, I in features, R rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.product import without_autocast
from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant


@dataclass(frozen=True)
class DoRA(Variant):
    """``diag(m / n) (W + s B A) - W``."""

    name = "dora"
    more: ClassVar[tuple[str, ...]] = ("magnitude",)
    additive = False
    finishes = True
    of_base = True
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

    def packed(self) -> Variant:
        """The lengths of a packed weight are kept: they cannot be had without unpacking all."""
        return PackedDoRA(self.scaling, self.fixed, self.offset)

    def weight(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """The weight as the layer reads it."""
        return cast("Tensor", getattr(layer, spec.weight))

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """It changes rows of full rank."""
        return None

    @torch.no_grad()
    def lengths(self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change) -> Tensor:
        """The lengths of the rows of ``W + s B A``: (out,), or (E, out)."""
        own = c.tensors
        pairs = [(own["A"], own["B"]), *([(own["A0"], own["B0"])] if self.offset else ())]
        wide = torch.promote_types(own["A"].dtype, torch.float32)
        with without_autocast(own["A"].device.type):
            squares, product = self.rows(kind, layer, W, c)
            factors = [kind.to_matrices(layer, A.to(wide), B.to(wide)) for A, B in pairs]
            mixed = [(product(A).to(wide) * B).sum(-1) for A, B in factors]
            both = [[((B @ (A @ C.mT)) * D).sum(-1) for C, D in factors] for A, B in factors]
            cross, square = mixed[0], both[0][0]
            if self.offset:  # in an order in which equal ones cancel exactly
                cross = mixed[0] - mixed[1]
                square = (both[0][0] - both[0][1]) + (both[1][1] - both[1][0])
            squares = squares + (2 * c.scaling * cross + c.scaling**2 * square)
        lengths = squares.clamp_min(0).sqrt()
        return lengths if c.spec.experts else lengths.flatten()

    def whole(self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change) -> Tensor:
        """V as matrices (..., out, in) in at least float32, for lengths that need it."""
        assert W is not None
        wide = torch.promote_types(W.dtype, torch.float32)
        tensors = {role: tensor.to(wide) for role, tensor in c.tensors.items()}
        with without_autocast(W.device.type):
            W = W.to(wide)
            V = W + self.update(kind, layer, W, c._replace(tensors=tensors)) * c.scaling
            return kind.to_matrix(layer, V)

    def rows(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The squared lengths of the rows of W, and what makes ``W A^T`` of an A."""
        assert W is not None
        W_OI = kind.to_matrix(layer, W)
        if c.spec.part:
            W_OI = W_OI.narrow(-2, c.spec.start, c.spec.n_out)
        wide = torch.promote_types(W.dtype, torch.float32)
        squares = torch.linalg.vector_norm(W_OI, dim=-1, dtype=wide).square()
        # A follows W, which is never copied to another dtype.
        return squares, lambda A_RI: W_OI @ A_RI.to(W_OI.dtype).mT

    def ratio(self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change) -> Tensor:
        """``m / n``, n rounded as m is, so that they start alike; a row of zeros stays one."""
        m = c.tensors["magnitude"]
        n = self.lengths(kind, layer, W, c).to(m.dtype)
        return m / n.clamp_min(torch.finfo(n.dtype).tiny)

    def add_to_output(
        self, kind: LayerKind, layer: nn.Module, x: Tensor, former: Tensor, y: Tensor, c: Change
    ) -> Tensor:
        """``m / n`` of what the weight makes of x is added, less what the layer computed.

        The bias is not scaled, and dropout acts on the input of A alone.
        """
        f = kind.beside_output(layer, self.ratio(kind, layer, self.weight(layer, c.spec), c))
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
        ratio = self.ratio(kind, layer, self.weight(layer, c.spec), c)
        more, bias = ratio - 1, kind.bias(layer, c.spec)
        own = y.narrow(-1, c.spec.start, c.spec.n_out) if c.spec.part else y
        product = own if bias is None else own - bias
        if c.spec.part or y.dtype != more.dtype:
            return _added(y, more * product, c)
        return torch.addcmul(y, more, product)

    def add_to_weight(
        self, kind: LayerKind, layer: nn.Module, W: Tensor, total: Tensor, c: Change
    ) -> Tensor:
        """V with its rows scaled is added, less W."""
        f = self.ratio(kind, layer, W, c)
        update = self.update(kind, layer, W, c) * c.scaling
        more = self.scaled(f - 1, kind.to_matrix(layer, W + update), c.spec)
        return total + (update + kind.from_matrix(layer, more, W.shape)) * c.weight

    def scaled(self, factors: Tensor, V_OI: Tensor, spec: Spec) -> Tensor:
        """The rows of a weight times a factor each; those of other parts times zero."""
        if spec.part:
            outside = V_OI.shape[-2] - spec.start - spec.n_out
            factors = nn.functional.pad(factors, (spec.start, outside))
        return factors.reshape(*V_OI.shape[:-1], 1) * V_OI


@dataclass(frozen=True)
class PackedDoRA(DoRA):
    """The same over a weight that only the layer's own forward can read."""

    more = ("magnitude", "lengths")
    derived = ("lengths",)
    finishes = False

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The lengths of the former rows are (out,)."""
        return {**super().shapes(spec), "lengths": (spec.n_out,)}

    def dtype(self, role: str, dtype: torch.dtype) -> torch.dtype:
        """At least float32 for the lengths too."""
        return super().dtype("magnitude" if role == "lengths" else role, dtype)

    def trains(self, role: str) -> bool:
        """Lengths are those of the base."""
        return role != "lengths" and super().trains(role)

    def starting(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec,
        tensors: Mapping[str, Tensor], scaling: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The lengths of the rows as they are."""
        assert W is not None
        lengths = DoRA.rows(self, kind, layer, W, Change(spec, tensors, scaling, scaling))[0].sqrt()
        return {"magnitude": lengths, "lengths": lengths.clone()}

    def weight(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """It is not read."""
        return None

    def rows(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """From the lengths that were kept, and by the layer's own forward."""
        squares = c.tensors["lengths"].square()
        return squares, lambda A_RI: kind.product(layer, c.spec, A_RI).mT


def _added(y: Tensor, change: Tensor, c: Change) -> Tensor:
    """``y + weight * change``, rounded once."""
    if isinstance(c.weight, Tensor) or c.weight != 1:
        change = change * c.weight
    if c.spec.part:
        after = y.shape[-1] - c.spec.start - c.spec.n_out
        change = nn.functional.pad(change, (c.spec.start, after))
    return (y.to(change.dtype) + change).to(y.dtype)
