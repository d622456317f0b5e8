"""What lora_inject must know of a kind of layer to adapt it: the interface, with usual answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic import starting_values as initial
from lora_inject.kinds.shown import effective_property
from lora_inject.own import own_class, own_tensor
from lora_inject.settings import Settings
from lora_inject.sharding import is_distributed, placements_of_pair, replicated, whole, whole_shape
from lora_inject.variants import Change, Spec, Variant

Way = Literal["branch", "weight"]
Changes = list[tuple[Variant, Change]]  # of one weight
# What adapter files call A and B: see ``formats.data``. "other" is what only we have.
Form = Literal["linear", "embedding", "conv", "experts", "other"]


class Kind(ABC):
    """One kind of layer, and how an adapter acts on it; stateless.

    There are two ways. Branch: the layer's own forward runs, and ``scaling * B A x`` is added to
    what it returns; a kind says ``down``, which makes h of x and A, and ``up``, which makes the
    delta of h and B. Weight: where the layer reads its weight it sees ``W + scaling * B A``; a kind
    says ``update``, which a branch needs for merging too.

    Attributes:
        name: what reports call the kind.
        linear_like: whether ``"all-linear"`` selects it.
        has_parts: whether ``specs`` heeds ``settings.parts``.
        transposes: whether the weight is (in, out), so that its update is B A transposed.
        zero: which of A and B starts at zero.
        rank_dim: the dimension of h that counts the rank; the first one counts the rows of a batch.
        stacks: whether ``down`` and ``up`` are products with the matrices A and B, of the last
            dimension of x, so that many pairs may be stacked.
        in_products: how it is said that a weight acts in products with it.
        drops_in_products: whether dropout can act on what weights are known to be multiplied by.
        has_rows: whether the weight is a table, a row for each id, of which some may train alone.
        below: a class whose forward the branch is added to directly, so that a subclass that
            scales or shifts what ``super().forward`` returns does the same to the adapter. None
            adds it to what the layer as a whole returns.
    """

    name: ClassVar[str]
    linear_like: ClassVar[bool] = False
    has_parts: ClassVar[bool] = False
    transposes: bool = False
    zero: ClassVar[str] = "B"
    rank_dim: ClassVar[int] = -1
    stacks: ClassVar[bool] = False
    has_rows: ClassVar[bool] = False
    in_products: ClassVar[str] = "in products with its weight"
    drops_in_products: ClassVar[bool] = False
    below: ClassVar[type[nn.Module] | None] = None

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this kind is for the module."""

    @abstractmethod
    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """The pairs A, B that the module gets."""

    def way(self, module: nn.Module) -> Way:
        """How a module of this kind is adapted where nothing else decides."""
        return "branch"

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """Why a module of this kind cannot be adapted in this way, with the remedy; else None."""
        return None

    def merge_refusal(self, module: nn.Module, base: type[nn.Module], way: Way) -> str | None:
        """Why the adapter cannot be folded into the weight, with the remedy; None where it can.

        Args:
            module: the adapted layer.
            base: the class it had before.
            way: how it is adapted; in the weight, folding changes nothing but the rounding.
        """
        return None

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """Branch: ``h = A dropout(x)``.

        Args:
            layer: the adapted layer, for its options.
            x: the layer's first input.
            y: what the layer computed without the adapter.
            A: the parameter A.
            dropout: the probability in force: the adapter's in training mode, else 0.

        Returns:
            A tensor whose dimension ``rank_dim`` counts the rank.
        """
        raise NotImplementedError(f"{self.name} layers are adapted in their weight")

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Branch: ``B h``, what the adapter adds to the layer's output, before scaling.

        Args:
            layer: the adapted layer, for its options.
            x: the layer's first input.
            h: what ``down`` returned.
            B: the parameter B.

        Returns:
            A tensor of the shape of the layer's output, or of its part.
        """
        raise NotImplementedError(f"{self.name} layers are adapted in their weight")

    def branches_at(self, base: type[nn.Module]) -> type[nn.Module] | None:
        """Branch: ``below`` for layers of this class."""
        return self.below

    def add_rows(
        self, layer: nn.Module, x: Tensor, y: Tensor, index: Tensor, rows: Tensor
    ) -> Tensor:
        """Branch: an output y with what rows, added to those of the weight, make of the input x.

        Args:
            layer: the adapted layer, for its options.
            x: the layer's first input.
            y: what the layer returned.
            index: the ids of the rows (n,), ascending.
            rows: what is added to them (n, width).
        """
        raise NotImplementedError(f"{self.name} layers have no rows of ids")

    def is_product(self, base: type[nn.Module]) -> bool:
        """Branch: whether the class's own forward is ``W x + b`` of its weight and bias, exactly.

        Then a layer and its adapters may be computed at once, by ``adapted_linear``.
        """
        return False

    def form(self, layer: nn.Module) -> Form:
        """What adapter files call the layer's A and B."""
        return "other"

    def to_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A as (..., r, in) and B as (..., out, r), of which ``B A`` is the update."""
        return A, B

    def from_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The way back from ``to_matrices``, for any rank."""
        return A, B

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """A tensor of the weight's shape as (..., out, in), like the product of ``to_matrices``."""
        return W.transpose(-2, -1) if self.transposes else W

    def from_matrix(self, layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The way back from ``to_matrix``, to the weight's shape."""
        return matrix.transpose(-2, -1) if self.transposes else matrix

    def update(self, layer: nn.Module, W: Tensor, spec: Spec, A: Tensor, B: Tensor) -> Tensor:
        """``B A`` in the shape of the weight W, with zeros in the rows that are of other parts."""
        A, B = self.to_matrices(layer, A, B)
        if spec.part:
            n_out = self.to_matrix(layer, W).shape[-2]
            B = F.pad(B, (0, 0, spec.start, n_out - spec.start - spec.n_out))
        return self.from_matrix(layer, B @ A, W.shape)

    def effective(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """Weight: what the layer reads in place of W: the sum in A's precision, rounded once."""
        total: Any = W
        for variant, change in changes:
            total = variant.add_to_weight(self, layer, W, total, change)
        return total.to(W.dtype)

    def multiplies(self, module: nn.Module, specs: Sequence[Spec], variant: Variant) -> bool:
        """Weight: whether it is known how the module's own forward multiplies by these weights."""
        return False

    def compiles_products(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Weight: whether a compiler follows the products of weights of a dtype, in one graph."""
        return False

    def multiplied(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """Weight: what the layer's own forward reads in place of W; ``effective`` is for others."""
        return self.effective(layer, W, changes)

    def affine_refusal(self, layer: nn.Module) -> str | None:
        """Why what a layer computes is not known to be ``W x + b``: never in the weight."""
        return None

    def dense(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """The whole weight, worked out where it is packed; None where it cannot be."""
        weight = layer._parameters.get(spec.weight)
        if weight is not None and is_distributed(weight):
            return whole(weight)
        return weight if weight is not None and is_plain(weight) else None

    def product(self, layer: nn.Module, spec: Spec, rows: Tensor) -> Tensor:
        """``W`` of rows (N, in) by the layer's own forward, where the weight is packed."""
        raise NotImplementedError(f"{self.name} layers have no packed weight")

    def bias(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """What the layer adds to ``W x``, in the rows of the pair's part: (out,), or None."""
        bias = own_tensor(layer, "bias")  # a buffer, of layers like GPTQ's
        return bias.narrow(0, spec.start, spec.n_out) if spec.part and bias is not None else bias

    def beside_output(self, layer: nn.Module, vector: Tensor) -> Tensor:
        """A vector (out,) in a shape in which it multiplies what the layer returns."""
        return vector

    def rows_refusal(self, layer: nn.Module) -> str | None:
        """Why it is not known which vectors the rows of A are multiplied with; None where it is."""
        return f"the vectors that a layer of the kind {self.name} multiplies are not known."

    def own_rows(self, layer: nn.Module) -> str | None:
        """Why a layer of a kind that usually acts beside its forward multiplies other vectors."""
        if self.way(layer) == "branch":
            return None
        return f"the forward of {own_class(layer).__name__} makes other vectors of its input."

    def input_rows(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The vectors that the rows of A are multiplied with, as ``to_matrices`` has them.

        Args:
            layer: the layer.
            x: its first input.
            y: what it returned, or a tensor of that shape.

        Returns:
            (..., N, in), a view of x where it can be one.
        """
        raise NotImplementedError(self.rows_refusal(layer))

    def output_rows(self, layer: nn.Module, y: Tensor) -> Tensor:
        """An output, or its gradient, beside ``input_rows``: (..., N, out)."""
        raise NotImplementedError(self.rows_refusal(layer))

    def members(self, weights: tuple[str, ...]) -> dict[str, Any]:
        """Weight: what the adapted class gets in order to show effective weights."""
        return {name: effective_property(name) for name in weights}

    def initial(self, spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starting values, float32 on the CPU: A kaiming-uniform, B zero (LoRA section 4.1)."""
        fan_in = math.prod(spec.A_shape[1:])
        A = initial.kaiming_uniform(spec.A_shape, fan_in, generator)
        return A, initial.zeros(spec.B_shape)

    def placements(self, weight: Tensor, spec: Spec) -> tuple[list[Any], list[Any]]:
        """Where the parts of A and of B go beside a weight that is a DTensor."""
        A, B = placements_of_pair(weight, self.transposes)
        # The rows of a part of a fused projection would lie on some of the ranks alone.
        return A, replicated(B) if spec.part else B

    def weight(self, module: nn.Module, name: str) -> Tensor:
        """The tensor whose device and dtype the adapter follows, read without side effects."""
        for owned in (module._parameters, module._buffers):
            if name in owned and owned[name] is not None:
                return owned[name]  # type: ignore[return-value]
        # A parametrized weight is computed when it is read, and spectral_norm moves then.
        originals = getattr(getattr(module, "parametrizations", None), name, None)
        if isinstance(originals, nn.Module):
            return max(originals.parameters(), key=Tensor.numel)  # beside norms of its rows
        value = getattr(module, name)
        assert isinstance(value, Tensor)
        return value


@lru_cache  # very many layers have the same one
def linear_spec(weight: str, n_in: int, n_out: int, r: int) -> Spec:
    """The spec of a matrix: A is (r, in), B is (out, r)."""
    return Spec(weight, n_in, n_out, (r, n_in), (n_out, r))


def out_in_spec(name: str, weight: Tensor, r: int) -> Spec:
    """The spec of a matrix that is (out, in), from its own shape."""
    n_out, n_in = whole_shape(weight)
    return linear_spec(name, n_in, n_out, r)


def overrides_forward(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether the module's class has a forward other than that of the class we know."""
    return getattr(own_class(module), "forward", None) is not known.forward


def is_plain(weight: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether a weight is an ordinary floating-point Parameter, to which something can be added."""
    if type(weight) not in (nn.Parameter, Tensor) or not isinstance(weight, nn.Parameter):
        return False
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def is_packed(weight: Tensor) -> bool:
    """Whether only the layer's own forward can read a weight: integers, or a tensor's subclass."""
    return type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or (
        weight.dtype.itemsize == 1
    )  # fmt: skip
