"""Capacity on paper: the bytes that training needs on each device, and how many devices it takes.

Parameters are divided as PyTorch's own engines do it (``shards``); activations are counted from the
model's own forward (``activations``).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lora_inject.capacity.activations import saved_for_backward
from lora_inject.capacity.shards import Held, plan_of, shares
from lora_inject.capacity.without_values import example_inputs, on_meta, to_meta
from lora_inject.printing import Section, Shown, Tables, count, plural, size
from lora_inject.report.bytes import optimizer_states
from lora_inject.settings import check_count

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


@dataclass(frozen=True, repr=False)
class Capacity(Shown):
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
        working: what else the backward pass starts with: the outputs, and gradients of
            activations, which take twice the largest tensor that is kept.
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
            ("outputs and their gradients", self.working),
        ]

    def _tables(self) -> Tables:
        read = ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in self.inputs.items())
        title = (
            f"Capacity of {self.model} on {plural(self.fsdp * self.tp, 'device')} "
            f"(FSDP {self.fsdp} x TP {self.tp}), each FSDP rank with {read}"
        )
        rows = [(line, size(n)) for line, n in [*self._lines(), ("total", self.total)]]
        fits = [
            (
                fit.device,
                size(DEVICES[fit.device]),
                size(fit.usable),
                *("none" if n is None else count(n) for n in (fit.devices, fit.fsdp)),
                "-" if fit.total is None else size(fit.total),
            )
            for fit in self.fits
        ]
        columns = ("device", "?>reports", ">usable", ">devices", ">FSDP", ">on each")
        return Tables(
            [
                Section(title, ("", ">on each device"), rows),
                Section(f"Smallest number of devices (TP {self.tp})", columns, fits, self.notes),
            ]
        )


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

    While it works, torch's attention and dropout do nothing in any thread of this process.

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
    fsdp, tp, batch = check_count(fsdp, "fsdp"), check_count(tp, "tp"), check_count(batch, "batch")
    seq = None if seq is None else check_count(seq, "seq")
    twin = on_meta(model)
    given = example_inputs(twin, batch, seq) if inputs is None else to_meta(inputs)
    share_of = shares(twin)
    products = {p: share.products for p, share in share_of.items() if share.products}
    saved = saved_for_backward(twin, given, products, tp)
    held = Held(twin, share_of, states, tp)
    activations = saved.checkpointed if checkpointing else saved.total
    working = saved.outputs + 2 * saved.largest

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
        notes=_notes(twin, fsdp, tp, fits),
    )


def _shapes(inputs: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(inputs, Mapping):
        listed = inputs if isinstance(inputs, tuple) else (inputs,)
        inputs = {f"input {i}": value for i, value in enumerate(listed, start=1)}
    return {name: tuple(t.shape) for name, t in inputs.items() if isinstance(t, Tensor)}


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


def _notes(model: nn.Module, fsdp: int, tp: int, fits: tuple[Fit, ...]) -> tuple[str, ...]:
    config = getattr(model, "config", None)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    attention = (
        "Attention is computed step by step ('eager') and keeps its S x S probabilities."
        if eager
        else "scaled_dot_product_attention is one fused kernel: it keeps q, k, v, its output and "
        "the log-sum-exp."
    )
    notes = [
        attention,
        "Dropout keeps its result and one byte for each element. The gradients of activations that "
        "exist at a time are twice the largest tensor that is kept.",
        "FSDP divides rows, block by block; what is in no block stays gathered, and one block is "
        "fetched while another runs.",
        "What a device reports is given in the unit of all else: "
        + ", ".join(
            f"one sold as {name} has {n // 2**30} GiB, which are {size(n)}"
            for name, n in DEVICES.items()
        )
        + f". {100 * RESERVE:.0f} % is left for the context and fragmentation.",
    ]
    experts = {p.shape[0] for p in model.parameters() if p.dim() == 3 and p.shape[0] > 1}
    if getattr(config, "_experts_implementation", None) and experts:
        notes.append("Experts are one grouped product; how tokens are routed changes nothing then.")
        if min(experts) < max(fsdp, *(fit.fsdp or _MOST for fit in fits)):
            notes.append(
                f"fully_shard divides {min(experts)} fused experts among as many ranks at most, "
                "unless its shard_placement_fn says Shard(1); the former is counted."
            )
    if tp > 1 and plan_of(model):
        notes.append(
            "Tensor parallelism follows the model's own plan and divides embeddings too; norms, "
            "the residual stream and the logits are whole on each device."
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
