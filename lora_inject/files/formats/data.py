"""An adapter apart from any model and any format: what every reader makes and every writer takes.

The form of a pair says what its A and B look like, which some formats put into the key:

    linear     A (r, in), B (out, r); also the packed projections of attention
    embedding  A (r, rows), B (width, r)
    conv       A (groups r, in/groups, *kernel), B (out, r, 1..)
    experts    A (E, r, in), B (E, out, r); without E, a matrix that is a parameter of its own
    other      whatever a kind of layer makes of them that no other library has
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_inject.arithmetic.thinning import Drops
from lora_inject.errors import FormatError
from lora_inject.kinds.base import Form
from lora_inject.variants import SCALINGS, VARIANTS, name_prefix


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor with values."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def is_usable(tensor: Tensor, floating: bool) -> bool:
    """Whether it has real values, of 16 bits or more where they are floating."""
    if not is_plain(tensor) or tensor.is_complex():
        return False
    return not floating or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)


@dataclass(frozen=True)
class PairData:
    """One pair A, B.

    Attributes:
        path: the module's path in the model that it is for.
        A: the matrix A, in the shape that its form says.
        B: the matrix B.
        alpha: the delta is scaled by alpha / rank; None where the file does not say.
        form: what A and B look like.
        weight: the parameter of the module that it adapts; "" where only the model can tell.
        part: the name of the part of a fused projection, or "".
        span: first output feature of the part and how many all parts have, (0, 0) without one.
        dropout: dropout of the adapter's input in training.
        drops: what of the adapter is left out in training.
        layout: "in_out" for a weight whose last two dimensions stand so, where that is known.
        in_attention: whether it is the ``out_proj`` of an ``nn.MultiheadAttention``.
        rule: how alpha and the rank become the factor of ``B A``: a name of ``variants.SCALINGS``.
        fixed: the factor that does not train, "A" or "B"; "" where both do.
        variant: what the tensors are to the weight: a name of ``variants.VARIANTS``.
        others: the tensors that the variant has besides A and B, by role.
        start: where half of the rank is a start that is subtracted, how it was made: a name of
            ``starts.STARTS``, or "saved" where that is not known; "" elsewhere.
        r: the rank of a variant whose tensors need not tell it; 0 elsewhere.
        kernel: the sizes of a convolution's kernel, of such a variant where a model tells them.
        filled: whether it is zeros for readers that want it, of a weight that is not adapted.
    """

    path: str
    A: Tensor
    B: Tensor
    alpha: float | None
    form: Form = "linear"
    weight: str = "weight"
    part: str = ""
    span: tuple[int, int] = (0, 0)
    dropout: float = 0.0
    layout: str = ""
    in_attention: bool = False
    rule: str = "lora"
    fixed: str = ""
    variant: str = "lora"
    others: Mapping[str, Tensor] = field(default_factory=dict)
    start: str = ""
    r: int = 0
    kernel: tuple[int, ...] = ()
    filled: bool = False
    drops: Drops = field(default_factory=Drops)

    def __post_init__(self) -> None:
        if not all(tensor.numel() for tensor in (self.A, self.B, *self.others.values())):
            raise FormatError(
                f"A or B of {self.name} is empty: {tuple(self.A.shape)}, {tuple(self.B.shape)}.",
                remedy="One rank of a sharded model has saved it: gather the parameters there "
                "(ZeRO-3, FSDP), and save again.",
            )
        dims = self.A.dim(), self.B.dim()
        if (dims[0] != dims[1] and not self.has_own_shapes) or min(dims) < 2:
            raise FormatError(f"A and B of {self.name} have {dims[0]} and {dims[1]} dimensions.")
        for tensor in (self.A, self.B, *self.others.values()):
            if not is_usable(tensor, floating=True):
                raise FormatError(f"A and B of {self.name} are no plain tensors: {tensor.dtype}.")
        ranks = self.A.shape[1 if self.form == "experts" and dims[0] == 3 else 0]
        if self.start and (self.rank % 2 or ranks % self.rank):
            raise FormatError(f"A and B of {self.name} are no adapter beside a start of its rank.")

    @property
    def rank(self) -> int:
        """The rank r, of each group and each expert."""
        experts = self.B.dim() == 3 and self.form == "experts"
        return self.r or int(self.B.shape[2 if experts else 1])

    @property
    def has_own_shapes(self) -> bool:
        """Whether A and B are what its variant makes of them, and not those of a ``B A``."""
        return VARIANTS[self.variant].own_shapes

    @property
    def dropouts(self) -> tuple[tuple[str, float], ...]:
        """All dropouts, by the names that ``inject(dropout=)`` has for them."""
        return ("input", self.dropout), ("rank", self.drops.rank), ("module", self.drops.module)

    def require_plain(self, what: str, remedy: str = 'Save it as "peft" or "kohya".') -> None:
        """Refuse a variant of which A and B alone would be kept.

        Raises:
            FormatError: it is one.
        """
        if self.others or self.has_own_shapes:
            missing = " and ".join(self.others) or "factors"
            raise FormatError(
                f"{self.name} is a {self.variant}, of which {what} has no {missing}.",
                remedy=remedy,
            )

    @property
    def own_rank(self) -> int:
        """The rank without that of a start that is subtracted."""
        return self.rank // 2 if self.start else self.rank

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role, with a start that is subtracted apart."""
        if not self.start:
            return {"A": self.A, "B": self.B, **self.others}
        r, experts = self.own_rank, self.form == "experts" and self.B.dim() == 3
        if experts:
            (A, A0), (B, B0) = torch.split(self.A, r, 1), torch.split(self.B, r, 2)
        else:  # of a convolution, half of each group's
            halves = torch.split(self.A.reshape(-1, 2 * r, *self.A.shape[1:]), r, 1)
            A, A0 = (half.flatten(0, 1) for half in halves)
            B, B0 = torch.split(self.B, r, 1)
        own = {"A": A, "B": B, "A0": A0, "B0": -B0}
        return {**{role: tensor.contiguous() for role, tensor in own.items()}, **self.others}

    @property
    def is_untrained(self) -> bool:
        """Whether it changes nothing, since a factor is zero or the start is there still."""
        own = self.tensors
        if self.start:
            return all(torch.equal(own[role], own[f"{role}0"]) for role in ("A", "B"))
        return not all(tensor.any() for tensor in own.values())

    @property
    def known_alpha(self) -> float:
        """Alpha.

        Raises:
            FormatError: the file does not say it.
        """
        if self.alpha is None:
            raise FormatError(
                f"the file does not say alpha, and so not the scaling of {self.name}.",
                remedy="Say it: alpha=16, or --alpha 16.",
            )
        return self.alpha

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return SCALINGS[self.rule].factor(self.known_alpha, self.rank)

    @property
    def key(self) -> str:
        """The start of loralib's keys for it."""
        return f"{self.path}.{name_prefix(self.weight, self.part)}".lstrip(".")

    @property
    def name(self) -> str:
        """Its path with the parameter, for messages."""
        plain = self.weight in ("", "weight")
        return f"{self.path}{'' if plain else '.' + self.weight}" + (
            f" ({self.part})" if self.part else ""
        )


@dataclass(frozen=True)
class RowsData:
    """Rows of a table, those of an embedding or an output head, that trained alone.

    Attributes:
        path: the module's path in the model that it is for.
        ids: which rows, in ascending order.
        rows: their values (n, width), the base's and what was added to it.
        follows: whether it is tied to an embedding whose rows are here too.
    """

    path: str
    ids: tuple[int, ...]
    rows: Tensor
    follows: bool = False

    def __post_init__(self) -> None:
        if not is_usable(self.rows, floating=True):
            raise FormatError(f"the rows of {self.path} are no plain tensor: {self.rows.dtype}.")


@dataclass(frozen=True)
class AdapterData:
    """One adapter: its pairs, and whatever else it trained.

    Attributes:
        pairs: A and B of every layer.
        tensors: biases and ``train_also`` values, by the name that they have in the base model.
        bias: the bias mode; "" where the file does not say.
        train_also: paths of the modules that trained in full.
        targets: what chose the layers, for people; a reader of files may not know it.
        base: the fingerprint of the base model, empty where there is none.
        rows: that of layers with a row for each token, which it does not adapt.
        untouched: that of a sample of the other weights of the base.
        base_name: where the base model came from, or "".
        model_class: the class of the base model, or "".
        task: PEFT's word for what the base model does, or "".
        modules: the paths of all modules of the model, for writers that name layers by pattern,
            with how many features go out of each, 0 where it does not say; None where no model is
            at hand.
        beside: the adapters that were in use while it trained.
        facts: what a format knows beyond this and a reader may want to show.
        said: what a PEFT config says of other things than the tensors, which is written again.
        dtype: "base" where A and B follow the 16 bits of the base; "" where nothing says so.
        tables: tables of which some rows trained.
        added: what is added to tensors of the base, by their names: a model tells their values.
        component: what the model is called in its pipeline, where that is known.
        encoders: how many text encoders its pipeline has, where that is known.
        sizes: the numbers of layers, heads and heads of keys of a language model, and whether its
            head is tied, where a format needs them.
        left: how many names of the file are for other parts of a pipeline, by what is in front.
    """

    pairs: tuple[PairData, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    bias: str = "none"
    train_also: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] = field(default_factory=dict)
    untouched: Mapping[str, Any] = field(default_factory=dict)
    base_name: str = ""
    model_class: str = ""
    task: str = ""
    modules: Mapping[str, int] | None = None
    beside: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    tables: tuple[RowsData, ...] = ()
    added: Mapping[str, Tensor] = field(default_factory=dict)
    component: str = ""
    encoders: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in (*self.tensors.items(), *self.added.items()):
            usable = is_plain(tensor) if tensor.is_complex() else is_usable(
                tensor, floating=tensor.is_floating_point()
            )  # fmt: skip
            if not usable:
                raise FormatError(f"{name} is no plain tensor: {tensor.dtype}, {tensor.layout}.")

    @property
    def elements(self) -> int:
        """How many numbers the adapter holds."""
        pairs = sum(t.numel() for p in self.pairs for t in (p.A, p.B, *p.others.values()))
        pairs += sum(own.rows.numel() for own in self.tables)
        return pairs + sum(math.prod(t.shape) for t in self.tensors.values())

    def require_no_rows(self, what: str) -> None:
        """Refuse rows that would be left out.

        Raises:
            FormatError: there are such.
        """
        if self.tables:
            raise FormatError(
                f"{self.tables[0].path} has rows that train, for which {what} has no word.",
                remedy='Save it as "peft"; or, where it is not tied, merge it, and save the model.',
            )
