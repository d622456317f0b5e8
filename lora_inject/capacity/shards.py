"""How a model's parameters are divided among devices: tensor parallelism, then FSDP.

FSDP2 (``fully_shard`` on every block and on the model) divides the rows of each parameter; tensor
parallelism divides a weight by its outputs ("column-wise") or its inputs ("row-wise").
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.core.roles import ADAPTER_ROLES, roles
from lora_inject.core.state import adapters_of
from lora_inject.report.bytes import stored_tensors
from lora_inject.variants import SIDES

# What tensor parallelism makes of the products of a divided weight: each device has some of their
# features ("split"), or all of them after a sum over the devices ("whole").
Products = Literal["split", "whole"]


class Share(NamedTuple):
    """How tensor parallelism divides a parameter.

    Attributes:
        dim: the dimension along which it does, or None.
        products: what becomes of products with it; None changes nothing.
        side: whether that dimension counts what A reads ("in") or what B writes ("out").
    """

    dim: int | None = None
    products: Products | None = None
    side: Literal["in", "out"] | None = None


_UNDIVIDED = Share()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: what stands in its outermost lists, in registration order."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        return list(model.children())
    found = [block for child in model.children() for block in blocks(child)]
    return list(dict.fromkeys(found))


def shares(model: nn.Module) -> dict[Tensor, Share]:
    """The share of every parameter.

    With a tensor-parallel plan (``plan_of``) the weights that it names are divided, and embeddings;
    without one every weight of two or more dimensions is. A and B follow their weight.
    """
    plan = plan_of(model)
    found: dict[Tensor, Share] = {}
    for path, module in model.named_modules():
        adapters = adapters_of(module)
        ours = {name for adapter in adapters for name in adapter.parameters}
        own = {
            name: _share(parameter, module, _style(plan, path, name), bool(plan))
            for name, parameter in module._parameters.items()
            if parameter is not None and name not in ours
        }
        for name, share in own.items():
            parameter = module._parameters[name]  # an adapted weight reads as something else
            assert parameter is not None
            if found.get(parameter, _UNDIVIDED) == _UNDIVIDED:  # or divided where it is tied
                found[parameter] = share
        for adapter in adapters:
            for spec, names in adapter.pairs:
                base, first = own.get(spec.weight, _UNDIVIDED), 1 if spec.experts else 0
                dims = {"in": first + 1, "out": first}
                for role, name in names.items():
                    side = SIDES.get(role, "")
                    follows = base.side == side
                    share = Share(dims[side], base.products) if follows else _UNDIVIDED
                    found[module.get_parameter(name)] = share
    return found


def plan_of(model: nn.Module) -> Mapping[str, str]:
    """The tensor-parallel plan that transformers has for the model: styles by path; empty if none.

    One that names nothing inside the blocks, but a head, is none.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    return plan if any("*" in path for path in plan) else {}


def _style(plan: Mapping[str, str], path: str, name: str) -> str:
    """What the plan says of a parameter, in whose path ``*`` stands for numbers."""
    generic = ".".join("*" if part.isdecimal() else part for part in path.split("."))
    return plan.get(f"{generic}.{name}") or plan.get(generic) or ""


def _share(parameter: Tensor, module: nn.Module, style: str, planned: bool) -> Share:
    if parameter.dim() < 2:
        return _UNDIVIDED
    if not planned:
        return Share(0, None, "out")
    if isinstance(module, nn.Embedding):
        return Share(0, "whole", "in")  # some rows of the vocabulary each, summed up
    if "colwise" in style:
        return Share(-2, "whole" if "gather" in style else "split", "out")
    return Share(-1, "whole", "in") if "rowwise" in style else _UNDIVIDED


class Held:
    """The bytes of a model's parameters on each device."""

    def __init__(
        self, model: nn.Module, shares: Mapping[Tensor, Share], states: int, tp: int
    ) -> None:
        self._states = states
        self._buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        block_of = {p: i for i, block in enumerate(blocks(model)) for p in block.parameters()}
        self._parameters = [
            _Parameter(p, shares.get(p, _UNDIVIDED), role in ADAPTER_ROLES, block_of.get(p), tp)
            for p, role in roles(Look(model)).items()
        ]

    def sharded(self, fsdp: int) -> tuple[int, int, int, int]:
        """Base, adapters, gradients and optimizer state of the first rank, which has the most."""
        base, adapters, trained = self._buffers, 0, 0
        for parameter in self._parameters:
            n_bytes = parameter.bytes(fsdp)
            if parameter.is_adapter:
                adapters += n_bytes
            else:
                base += n_bytes
            trained += n_bytes if parameter.trains else 0
        return base, adapters, trained, trained * self._states

    def gathered(self, fsdp: int) -> int:
        """Whole parameters at a time, and the gradients that have not been divided yet.

        The model's own group, what is in no block, stays gathered; of the blocks one runs while
        the next is fetched.
        """
        if fsdp == 1:
            return 0
        weights: dict[int | None, int] = {}
        gradients: dict[int | None, int] = {}
        for parameter in self._parameters:
            n_bytes, block = parameter.bytes(1), parameter.block
            weights[block] = weights.get(block, 0) + n_bytes
            gradients[block] = gradients.get(block, 0) + (n_bytes if parameter.trains else 0)
        root = weights.pop(None, 0) + gradients.pop(None, 0)
        both = min(2, len(weights)) * max(weights.values(), default=0)
        return root + both + max(gradients.values(), default=0)


class _Parameter:
    """What of a parameter stands on a device."""

    def __init__(
        self, parameter: Tensor, share: Share, is_adapter: bool, block: int | None, tp: int
    ) -> None:
        self.is_adapter, self.block, self.trains = is_adapter, block, parameter.requires_grad
        stored = sum(t.numel() * t.element_size() for t in stored_tensors(parameter))
        shape = list(parameter.shape) or [1]
        self._element = stored / max(1, parameter.numel())  # below a byte for packed weights
        if share.dim is not None:
            shape[share.dim] = math.ceil(shape[share.dim] / tp)
        self._rows, self._row = shape[0], math.prod(shape[1:])

    def bytes(self, fsdp: int) -> int:
        """On the first of so many ranks: FSDP divides whole rows."""
        return math.ceil(math.ceil(self._rows / fsdp) * self._row * self._element)
