"""Capacity on paper: the bytes that training needs on each device, and how many devices that takes.

The sums follow PyTorch's own engines. FSDP2 (``fully_shard`` on every block and on the model) divides
the rows of each parameter; tensor parallelism divides weights by columns or rows; activations are
counted from the model's own forward (``activations``).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lora_inject.activations import (
    Products,
    blocks,
    example_inputs,
    on_meta,
    saved_for_backward,
    to_meta,
)
from lora_inject.adapter import adapters_of
from lora_inject.memory import optimizer_states, stored_tensors
from lora_inject.roles import ADAPTER_ROLES, roles
from lora_inject.settings import check_rank
from lora_inject.tables import Section, Tables, count, plural, size

# What torch reports as the memory of these cards (H100 and A100, H200), rounded down.
DEVICES = {"80 GB": 79 * 2**30, "141 GB": 139 * 2**30}
RESERVE = 0.05  # of a device, for its context, the libraries' workspaces and fragmentation
_MOST = 2**20  # devices; what does not fit then does not for another reason


@dataclass(frozen=True)
class Fit:
    """The smallest number of devices of one size on which training fits.

    Attributes:
        device: the size it is sold by.
        usable: its bytes without the reserve.
        fsdp: the smallest number of FSDP ranks; None if no number is enough.
        devices: FSDP ranks times tensor-parallel ranks.
        total: bytes on each of them.
    """

    device: str
    usable: int
    fsdp: int | None
    devices: int | None
    total: int | None


@dataclass(frozen=True)
class Capacity:
    """Bytes that training needs on each device; ``print`` shows it as a table.

    Attributes:
        model: the class of the model.
        optimizer: the optimizer.
        fsdp: ranks among which FSDP divides parameters, gradients and optimizer state.
        tp: tensor-parallel ranks.
        inputs: the shapes of what each FSDP rank reads.
        checkpointing: whether each block is computed again in the backward pass.
        base: weights and buffers of the base model.
        adapters: weights of A and B.
        gradients: of all that trains.
        states: optimizer state of all that trains.
        gathered: what FSDP has gathered at a time: what is in no block, and two blocks.
        activations: what the forward pass keeps for the backward pass.
        working: gradients of activations: twice the largest tensor that is kept.
        fits: how many devices of which size are enough, for the same tp.
        notes: what is assumed.
    """

    model: str
    optimizer: str
    fsdp: int
    tp: int
    inputs: dict[str, tuple[int, ...]]
    checkpointing: bool
    base: int
    adapters: int
    gradients: int
    states: int
    gathered: int
    activations: int
    working: int
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return sum(n for _, n in self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        shapes = {name: list(shape) for name, shape in self.inputs.items()}
        return {**asdict(self), "inputs": shapes, "notes": list(self.notes), "total": self.total}

    def _lines(self) -> list[tuple[str, int]]:
        again = ", blocks computed again" if self.checkpointing else ""
        return [
            ("base weights", self.base),
            ("adapters", self.adapters),
            ("gradients", self.gradients),
            (f"optimizer ({self.optimizer})", self.states),
            ("gathered by FSDP", self.gathered),
            (f"activations saved{again}", self.activations),
            ("gradients of activations", self.working),
        ]

    def _tables(self) -> Tables:
        read = ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in self.inputs.items())
        title = (
            f"Capacity of {self.model} on {plural(self.fsdp * self.tp, 'device')} "
            f"(FSDP {self.fsdp} x TP {self.tp}), each FSDP rank with {read}"
        )
        rows = [(line, size(n)) for line, n in [*self._lines(), ("total", self.total)]]
        fits = [
            (fit.device, size(fit.usable), "none", "-", "-")
            if fit.fsdp is None or fit.devices is None or fit.total is None
            else (
                fit.device,
                size(fit.usable),
                count(fit.devices),
                count(fit.fsdp),
                size(fit.total),
            )
            for fit in self.fits
        ]
        columns = ("device", ">usable", ">devices", ">FSDP", ">on each")
        return Tables(
            [
                Section(title, ("", ">on each device"), rows),
                Section(f"Smallest number of devices (TP {self.tp})", columns, fits),
                Section("Assumed", ("",), [(note,) for note in self.notes]),
            ]
        )

    def __str__(self) -> str:
        return self._tables().text()

    def _repr_html_(self) -> str:
        return self._tables().html()


def capacity(
    model: nn.Module,
    inputs: Any = None,
    *,
    batch: int = 1,
    seq: int | None = None,
    optimizer: str = "adamw",
    fsdp: int = 1,
    tp: int = 1,
    checkpointing: bool = False,
) -> Capacity:
    """Work out what training a model would need on each device; nothing is computed or changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> _ = inject(model, "0", r=4)
        >>> needed = capacity(model, torch.randn(32, 64))
        >>> needed.activations == 4 * (32 * 64 + 32 * 4)  # x and A x
        True

    Args:
        model: any ``nn.Module``, adapted or not, of the dtypes it would train in; it may be on the
            meta device, where a model of any size takes no memory.
        inputs: what its forward reads on each FSDP rank: a mapping of names, a tuple or a tensor;
            only shapes and dtypes matter. None makes them for a transformers model that reads
            tokens or images, with labels where its head predicts tokens.
        batch: rows of the inputs that are made.
        seq: tokens in each of their rows.
        optimizer: "adamw", "adam", "sgd", "sgd-momentum", "rmsprop", ...
        fsdp: FSDP ranks; parameters, gradients and optimizer state are divided among them.
        tp: tensor-parallel ranks, for each FSDP rank.
        checkpointing: whether every block is computed again in the backward pass.

    Returns:
        The bytes; ``str`` makes them readable, ``to_dict`` ready for JSON.

    Raises:
        ArgumentError: an argument cannot be used, or seq or inputs are missing.
        LoRAInjectError: the forward depends on values, or cannot use the inputs.
    """
    states = optimizer_states(optimizer)
    fsdp, tp, batch = check_rank(fsdp, "fsdp"), check_rank(tp, "tp"), check_rank(batch, "batch")
    seq = None if seq is None else check_rank(seq, "seq")
    twin = on_meta(model)
    given = example_inputs(twin, batch, seq) if inputs is None else to_meta(inputs)
    shares, planned = _shares(twin)
    products = {p: share.products for p, share in shares.items() if share.products}
    saved = saved_for_backward(twin, given, products, tp)
    held = _Held(twin, shares, states, tp)
    activations = saved.checkpointed if checkpointing else saved.total
    working = 2 * saved.largest

    def total(ranks: int) -> int:
        return sum(held.sharded(ranks)) + held.gathered(ranks) + activations + working

    fits = tuple(_fit(device, n, tp, total) for device, n in DEVICES.items())
    base, adapters, gradients, optimizer_bytes = held.sharded(fsdp)
    return Capacity(
        model=type(model).__name__,
        optimizer=optimizer,
        fsdp=fsdp,
        tp=tp,
        inputs=_shapes(given),
        checkpointing=checkpointing,
        base=base,
        adapters=adapters,
        gradients=gradients,
        states=optimizer_bytes,
        gathered=held.gathered(fsdp),
        activations=activations,
        working=working,
        fits=fits,
        notes=_notes(twin, tp, planned, fits),
    )


def _shapes(inputs: Any) -> dict[str, tuple[int, ...]]:
    listed = inputs if isinstance(inputs, tuple) else (inputs,)
    named = dict(inputs) if isinstance(inputs, Mapping) else {"input": t for t in listed[:1]}
    return {name: tuple(t.shape) for name, t in named.items() if isinstance(t, Tensor)}


def _fit(device: str, memory: int, tp: int, total: Callable[[int], int]) -> Fit:
    """The smallest number of ranks whose total fits; it falls with their number but from 1 to 2."""
    usable = int(memory * (1 - RESERVE))
    fits = [n for n in (1, _MOST) if total(n) <= usable]
    if not fits:
        return Fit(device, usable, None, None, None)
    low, high = 1, fits[0]  # low does not fit, or is 1 and known to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if total(middle) <= usable else (middle, high)
    return Fit(device, usable, high, high * tp, total(high))


# Parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """How tensor parallelism divides a parameter: along which dimension, and its products."""

    dim: int | None = None
    products: Products | None = None


_WHOLE = _Share()


def _shares(model: nn.Module) -> tuple[dict[Tensor, _Share], bool]:
    """The share of every parameter, and whether the model's own plan decided.

    With a tensor-parallel plan (transformers' ``tp_plan``) the weights that it names are divided,
    and embeddings; without one every weight of two or more dimensions is.
    """
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    shares: dict[Tensor, _Share] = {}
    for path, module in model.named_modules():
        ours = {name for adapter in adapters_of(module) for name in adapter.parameters}
        styles = {}
        for name, parameter in module._parameters.items():
            if parameter is None or name in ours:
                continue
            styles[name] = _style(plan, path, name)
            known = _share(parameter, module, styles[name], bool(plan))
            if parameter not in shares or known != _WHOLE:
                shares[parameter] = known
        for adapter in adapters_of(module):
            for spec, A, B in adapter.pairs:
                rows = styles.get(spec.weight, "") == "rowwise"
                columns = not plan or "colwise" in styles.get(spec.weight, "")
                products: Products | None = "split" if columns and plan else None
                shares[module._parameters[A]] = _Share(-1, "whole") if rows else _WHOLE
                shares[module._parameters[B]] = _Share(-2, products) if columns else _WHOLE
    return shares, bool(plan)


def _style(plan: Mapping[str, str], path: str, name: str) -> str:
    """What the plan says of a parameter, whose path has ``*`` there for numbers."""
    generic = ".".join("*" if part.isdecimal() else part for part in path.split("."))
    return plan.get(f"{generic}.{name}") or plan.get(generic) or ""


def _share(parameter: Tensor, module: nn.Module, style: str, planned: bool) -> _Share:
    if parameter.dim() < 2:
        return _WHOLE
    if not planned:
        return _Share(0)
    if isinstance(module, nn.Embedding):
        return _Share(0, "whole")  # by rows of the vocabulary; the rest is zero and summed up
    if "colwise" in style:
        return _Share(-2, "whole" if "gather" in style or "rep" in style else "split")
    return _Share(-1, "whole") if "rowwise" in style else _WHOLE


class _Held:
    """The bytes of a model's parameters on each device."""

    def __init__(
        self, model: nn.Module, shares: Mapping[Tensor, _Share], states: int, tp: int
    ) -> None:
        self._states = states
        self._buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        block_of = {p: i for i, block in enumerate(blocks(model)) for p in block.parameters()}
        self._parameters = [
            _Parameter(p, shares.get(p, _WHOLE), role in ADAPTER_ROLES, block_of.get(p), tp)
            for p, role in roles(model).items()
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
        self, parameter: Tensor, share: _Share, is_adapter: bool, block: int | None, tp: int
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


def _notes(model: nn.Module, tp: int, planned: bool, fits: tuple[Fit, ...]) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    attention = (
        "Attention is computed step by step ('eager') and keeps its S x S probabilities."
        if eager
        else "scaled_dot_product_attention is one fused kernel: it keeps q, k, v, its output and the "
        "log-sum-exp."
    )
    notes = [
        attention,
        "Dropout keeps one byte for each element. Gradients have the dtype of their parameter.",
        "FSDP divides rows, block by block; what is in no block stays gathered, and one block is "
        "fetched while another runs.",
        f"{100 * RESERVE:.0f} % of a device is left for its context and fragmentation.",
    ]
    if getattr(config, "_experts_implementation", None) and any(
        p.dim() == 3 for p in model.parameters()
    ):
        notes.append("Experts are one grouped product; how tokens are routed changes nothing then.")
    if tp > 1 and planned:
        notes.append(
            "Tensor parallelism follows the model's own plan and divides embeddings too; norms, the "
            "residual stream and the logits are whole on each device."
        )
    elif tp > 1:
        notes.append(
            "The model has no tensor-parallel plan: matrices are divided, activations are not."
        )
    if any(fit.fsdp is None for fit in fits):
        notes.append(
            "More FSDP ranks do not divide activations: use checkpointing, more tensor-parallel "
            "ranks, or fewer tokens at a time."
        )
    return tuple(notes)
