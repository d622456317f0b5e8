"""A different adapter for each row of a batch, as a server needs it.

The adapters of a layer stand side by side as one of their summed rank, and a mask on ``h = A x``
lets through what belongs to each row: two products for any number of adapters, as Punica
(arXiv 2310.18547) and S-LoRA (arXiv 2311.03285) have it, here with torch's own operations.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic.low_rank import side_by_side
from lora_inject.core.adapter import Adapter, Term
from lora_inject.core.blocks import block
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.errors import ArgumentError, LoRAInjectError, UnsupportedLayerError
from lora_inject.sharding import alongside
from lora_inject.variants.lora import add


@contextmanager
def per_row(model: nn.Module, adapters: Iterable[str | None]) -> Iterator[nn.Module]:
    """Give every row of a batch an adapter of its own, whatever is in use outside of the block.

    The first dimension of every adapted layer's input counts the rows. Works in training too:
    adapters learn from their rows if they train (``use(model, "fr", "de")`` before the block). With
    activation checkpointing the backward pass has to run inside of the block too, since it computes
    the layers once more.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2, adapter="fr")
        >>> _ = inject(model, nn.Linear, r=4, adapter="de")
        >>> with per_row(model, ["fr", "de", None]):
        ...     y = model(torch.randn(3, 4))

    Args:
        model: an adapted model.
        adapters: for each row the name of an adapter, or None for the base model.

    Yields:
        The same model.

    Raises:
        ArgumentError: an adapter is not known, or has trained biases or modules in place, of which
            a batch can have one only.
        UnsupportedLayerError: an adapter acts in a layer's weight, which all rows share.
        LoRAInjectError: the model is merged or disabled; and inside of the block, a layer's input
            has another number of rows.
    """
    names = _check_rows(adapters)
    wanted = frozenset(name for name in names if name is not None)
    look = Look(model)
    look.require_adapters()
    look.require_known(wanted, "adapters")
    look.require_no_block(but_rows=True)
    look.require_unmerged()
    for path, layer in look.layers.items():
        _require_branches(path, look.states[layer].adapters, wanted)
    for module, trained in look.trained:
        for name in wanted & trained.owners.keys():
            raise ArgumentError(
                f"adapters: {name!r} trained {trained.text(module)}, which all rows of a batch "
                "share.",
                remedy="Use it alone.",
            )

    def rows(module: nn.Module, state: State) -> Rows:
        chosen = [adapter for adapter in state.adapters if adapter.name in wanted]
        return Rows(look.index.path(module), names, chosen)

    with block(look, rows):
        yield model


class Rows:
    """What one layer adds to the rows of a batch.

    Args:
        path: the layer's path, for errors.
        names: the adapter of each row.
        adapters: those that stand on the layer; false if there are none.
    """

    def __init__(self, path: str, names: Sequence[str | None], adapters: list[Adapter]) -> None:
        self.path = path
        self.names = names
        groups: dict[tuple[Any, ...], list[Term]] = {}
        for term in (term for adapter in adapters for term in adapter.terms):
            groups.setdefault((*term.spec.place, term.dropout, term.plain), []).append(term)
        self.groups = [_Group(terms, names) for terms in groups.values()]

    def __len__(self) -> int:
        return len(self.groups)

    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with what each row's adapter adds to it."""
        for group in self.groups:
            y = group.add(layer, x, y, self._require_rows)
        return y

    def _require_rows(self, h: Tensor, dims: int) -> None:
        if h.dim() < dims or h.shape[0] != len(self.names):
            raise LoRAInjectError(
                f"its input has {h.shape[0] if h.dim() >= dims else 'no'} rows, and per_row was "
                f"given {len(self.names)}.",
                path=self.path,
                remedy="Give one name for each entry of the first dimension that the layer sees.",
            )


class _Group:
    """Adapters that add to the same features with the same dropout: one A, one B, one mask."""

    def __init__(self, terms: list[Term], names: Sequence[str | None]) -> None:
        self.terms = terms
        self.kind, self.spec, self.dropout = terms[0].kind, terms[0].spec, terms[0].dropout
        # One factor is applied while adding; the mask holds the others relative to it.
        self.factor = terms[0].factor
        self.chosen = torch.tensor(
            [[t.factor / self.factor * (t.adapter == name) for t in terms] for name in names],
            dtype=torch.float64,
            device="cpu",
        )
        self.masks: dict[Any, Tensor] = {}

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, require_rows: Any) -> Tensor:
        dropout = self.dropout if layer.training else 0.0
        if not self.terms[0].plain and dropout:  # A and A0 see the same input
            x, dropout = F.dropout(x, dropout), 0.0
        own = [self._tensors(layer, term) for term in self.terms]
        delta = self.delta(layer, x, y, own, ("A", "B"), dropout, require_rows)
        if not self.terms[0].plain:  # of one shape, so that they cancel where they are equal
            delta = delta - self.delta(layer, x, y, own, ("A0", "B0"), dropout, require_rows)
        return add(y, delta, self.factor, self.spec)

    def _tensors(self, layer: nn.Module, term: Term) -> dict[str, Tensor]:
        """The tensors of an adapter, without the ranks that are left out in training."""
        own = {role: getattr(layer, name) for role, name in term.names.items()}
        return term.drops.folded(own) if term.drops and layer.training else own

    def delta(
        self, layer: nn.Module, x: Tensor, y: Tensor, own: list[dict[str, Tensor]],
        roles: tuple[str, str], dropout: float, require_rows: Any,
    ) -> Tensor:  # fmt: skip
        """What the tensors of these roles make of the rows that are theirs."""
        A, B = self.stack(layer, own, roles)
        h = self.kind.down(layer, x, y, A, dropout)
        require_rows(h, 2 if self.kind.rank_dim < 0 else A.dim())
        return self.kind.up(layer, x, h * self.mask(h), B)

    def stack(
        self, layer: nn.Module, own: list[dict[str, Tensor]], roles: tuple[str, str]
    ) -> tuple[Tensor, Tensor]:
        """The tensors of these roles of all adapters."""
        changes = [
            t.change({role: tensors[role] for role in roles}, t.factor)
            for t, tensors in zip(self.terms, own, strict=True)
        ]
        pairs = [(c.tensors[roles[0]], c.tensors[roles[1]]) for c in changes]
        matrices = [self.kind.to_matrices(layer, A, B) for A, B in pairs]
        return self.kind.from_matrices(layer, *side_by_side(matrices))

    def mask(self, h: Tensor) -> Tensor:
        """For each row, 1 (or a relative scaling) at the ranks of its adapter, else 0."""
        key = (h.device, h.dtype, h.dim())
        if key not in self.masks:
            with torch.inference_mode(False):  # a later call may need it for a gradient
                ranks = torch.tensor([t.spec.rank for t in self.terms], device="cpu")
                mask = self.chosen.repeat_interleave(ranks, dim=1)
                mask = mask.repeat(1, h.shape[self.kind.rank_dim] // mask.shape[1])  # each group
                shape = [1] * h.dim()
                shape[0], shape[self.kind.rank_dim] = mask.shape
                self.masks[key] = mask.reshape(shape).to(h.device, h.dtype)
        return alongside(self.masks[key], h)


def _check_rows(adapters: Any) -> tuple[str | None, ...]:
    names = tuple(adapters) if isinstance(adapters, Iterable) else ()
    if isinstance(adapters, str) or not names or not all(isinstance(n, str | None) for n in names):
        raise ArgumentError(
            f"adapters must be a list with a name or None for each row, not {adapters!r}."
        )
    return names


def _require_branches(path: str, adapters: Iterable[Adapter], wanted: frozenset[str]) -> None:
    for adapter in adapters:
        if adapter.name in wanted and adapter.way == "weight":
            raise UnsupportedLayerError(
                f"{adapter.name!r} acts in its weight, which all rows of a batch share.",
                path=path,
                remedy="Run the rows one adapter at a time, each with use.",
            )
        if adapter.name in wanted and not adapter.settings.variant.additive:
            raise UnsupportedLayerError(
                f"{adapter.name!r} is a {adapter.settings.variant.name}, which is not summed row "
                "by row.",
                path=path,
                remedy="Run the rows one adapter at a time, each with use.",
            )
