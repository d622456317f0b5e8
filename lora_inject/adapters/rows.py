"""What a layer adds to the rows of a batch, each with an adapter of its own.

Two ways to the same, chosen by their cost. One stacks the A and B of each row and multiplies row by
row (``bmm``): for sequences. The other puts the adapters side by side as one of their summed rank,
and a mask on ``h = A x`` lets through what belongs to each row: two products for any number of
adapters (S-LoRA, arXiv 2311.03285), for few tokens and adapters. A change that is no ``B A`` (DoRA)
is made for the rows of one adapter after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.adapters.batch import Batch
from lora_inject.arithmetic.low_rank import side_by_side
from lora_inject.core.adapter import Adapter, Term
from lora_inject.core.dropping import dropout_now, drops_now
from lora_inject.core.tools import require_values
from lora_inject.errors import LoRAInjectError
from lora_inject.sharding import alongside
from lora_inject.variants.lora import add

# What to gather the A and B of a row costs, in tokens of the row multiplied with them. For a single
# token an accelerator, which reads more than it computes, rather reads all of them once.
_GATHERED = 32
_PLAIN = frozenset({Tensor, nn.Parameter})
Count = Callable[[Tensor, int], int]


class Rows:
    """What one layer adds to the rows of a batch.

    Args:
        path: the layer's path, for errors.
        names: the adapter of each row.
        adapters: those that stand on the layer; false if there are none.
        layer: the layer.
        batch: the batch of the model; None for a layer that has rows of its own.
    """

    def __init__(
        self,
        path: str,
        names: Sequence[str | None],
        adapters: list[Adapter],
        layer: nn.Module,
        batch: Batch | None,
    ) -> None:
        self.path, self.names, self.batch = path, names, batch
        self.terms = [term for adapter in adapters for term in adapter.terms]
        self._dropping = [term for term in self.terms if term.dropout]
        dropouts = self._dropouts(layer)
        self._last = dropouts, self._grouped(dropouts)

    def __len__(self) -> int:
        return len(self.terms)

    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with what each row's adapter adds to it."""
        dropouts, (known, groups) = self._dropouts(layer), self._last
        if dropouts != known:  # the mode has changed, or somebody has set one
            groups = self._grouped(dropouts)
            self._last = dropouts, groups
        for group in groups:
            y = group.add(layer, x, y, self._times)
        return y

    def _dropouts(self, layer: nn.Module) -> list[float]:
        """The dropout that is in force, of each term that has one."""
        return [dropout_now(layer, term) for term in self._dropping]

    def _grouped(self, dropouts: list[float]) -> list["_Group | _Alone"]:
        """The terms by what they read and where they add."""
        in_force = dict(zip(map(id, self._dropping), dropouts, strict=True))
        groups: dict[tuple[Any, ...], list[Term]] = {}
        for term in self.terms:
            if term.variant.additive:
                key = (*term.spec.place, in_force.get(id(term), 0.0), term.plain)
                groups.setdefault(key, []).append(term)
        alone = [_Alone(term, self.names) for term in self.terms if not term.variant.additive]
        return [*(_Group(terms, self.names) for terms in groups.values()), *alone]

    def _times(self, h: Tensor, dims: int) -> int:
        """How many entries in a row of h each row of the batch has."""
        if self.batch is None:
            raise LoRAInjectError(
                "it is in a part that reads no token ids, or joins such a part with one that does: "
                "its entries (images, say) are not the rows of the batch.",
                path=self.path,
                remedy="Call per_row on the parts instead, each with a name for each of its own "
                "entries.",
            )
        times = self.batch.times(h.shape[0]) if h.dim() >= dims else None
        if times is None:
            raise LoRAInjectError(
                f"its input has {h.shape[0] if h.dim() >= dims else 'no'} rows, and per_row was "
                f"given {len(self.names)}.",
                path=self.path,
                remedy="Give one name for each entry of the first dimension of what the model is "
                "called with; a layer whose input has other rows can have no adapter for each.",
            )
        return times


class _Group:
    """Adapters that add to the same features with the same dropout: one A, one B, one mask."""

    def __init__(self, terms: list[Term], names: Sequence[str | None]) -> None:
        self.terms = terms
        self.kind, self.spec = terms[0].kind, terms[0].spec
        # One factor is applied while adding; the mask holds the others relative to it.
        self.factor = terms[0].factor
        self.weighted = any(term.factor != self.factor for term in terms)
        self.ranks = [term.spec.rank for term in terms]
        position = {term.adapter: i for i, term in enumerate(terms)}
        self.index = [None if name is None else position.get(name) for name in names]
        self.chosen = torch.tensor(
            [[t.factor / self.factor * (t.adapter == name) for t in terms] for name in names],
            dtype=torch.float64,
            device="cpu",
        )
        self.masks: dict[Any, Tensor] = {}

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, count: Count) -> Tensor:
        """The layer's output with what each row's adapter adds to it."""
        dropout = dropout_now(layer, self.terms[0])
        if not self.terms[0].plain and dropout:  # A and A0 see the same input
            x, dropout = F.dropout(x, dropout), 0.0
        own = [_thinned(layer, term) for term in self.terms]
        delta = self.delta(layer, x, y, own, ("A", "B"), dropout, count)
        if not self.terms[0].plain:  # of one shape, so that they cancel where they are equal
            delta = delta - self.delta(layer, x, y, own, ("A0", "B0"), dropout, count)
        return add(y, delta, self.factor, self.spec)

    def delta(
        self, layer: nn.Module, x: Tensor, y: Tensor, own: list[dict[str, Tensor]],
        roles: tuple[str, str], dropout: float, count: Count,
    ) -> Tensor:  # fmt: skip
        """What the tensors of these roles make of the rows that are theirs."""
        pairs = self.pairs(own, roles)
        require_values(layer, x, [tensor for pair in pairs for tensor in pair])
        if self.kind.stacks and x.dim() > 1 and self.is_stacked(x, pairs):
            return self.by_row(x, pairs, dropout, count(x, 2))
        matrices = [self.kind.to_matrices(layer, A, B) for A, B in pairs]
        A, B = self.kind.from_matrices(layer, *side_by_side(matrices))
        h = self.kind.down(layer, x, y, A, dropout)
        mask = self.mask(h, count(h, 2 if self.kind.rank_dim < 0 else A.dim()))
        return self.kind.up(layer, x, h * mask, B)

    def pairs(
        self, own: list[dict[str, Tensor]], roles: tuple[str, str]
    ) -> list[tuple[Tensor, Tensor]]:
        """The tensors of these roles of each adapter."""
        changes = [
            t.change({role: tensors[role] for role in roles}, t.factor)
            for t, tensors in zip(self.terms, own, strict=True)
        ]
        return [(c.tensors[roles[0]], c.tensors[roles[1]]) for c in changes]

    def is_stacked(self, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether to multiply row by row costs less, and may be done."""
        tokens = x[..., 0].numel() // len(self.index)
        largest = max(self.ranks)
        less = tokens * sum(self.ranks) > (tokens + _GATHERED) * largest
        less = less and (tokens > 1 or x.is_cpu)
        return less and all(type(tensor) in _PLAIN for pair in [(x,), *pairs] for tensor in pair)

    def by_row(
        self, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], dropout: float, times: int
    ) -> Tensor:
        """One product for each row and factor; smaller ranks are padded with zeros."""
        r, rows = max(self.ranks), len(self.index)
        zeros = pairs[0][0].new_zeros(r, x.shape[-1]), pairs[0][1].new_zeros(self.spec.n_out, r)
        if min(self.ranks) < r:  # F.pad copies what it has nothing to add to
            pairs = [
                (F.pad(A, (0, 0, 0, r - A.shape[0])), F.pad(B, (0, r - B.shape[1])))
                for A, B in pairs
            ]
        chosen = [zeros if i is None else pairs[i] for i in self.index]
        A_KRI, B_KOR = (torch.stack([pair[side] for pair in chosen]).to(x.dtype) for side in (0, 1))
        x_KTI = x.reshape(rows, -1, x.shape[-1])  # the entries of a row stand together
        if dropout:
            x_KTI = F.dropout(x_KTI, dropout)
        h_KTR = torch.bmm(x_KTI, A_KRI.mT)
        if self.weighted:
            factors = [0.0 if i is None else self.terms[i].factor / self.factor for i in self.index]
            h_KTR = h_KTR * h_KTR.new_tensor(factors).reshape(-1, 1, 1)
        return torch.bmm(h_KTR, B_KOR.mT).reshape(*x.shape[:-1], -1)

    def mask(self, h: Tensor, times: int) -> Tensor:
        """For each entry, 1 (or a relative scaling) at the ranks of its row's adapter, else 0."""
        key = (h.device, h.dtype, h.dim(), times)
        if key not in self.masks:
            with torch.inference_mode(False):  # a later call may need it for a gradient
                ranks = torch.tensor(self.ranks, device="cpu")
                mask = self.chosen.repeat_interleave(ranks, dim=1)
                mask = mask.repeat(1, h.shape[self.kind.rank_dim] // mask.shape[1])  # each group
                mask = mask.repeat_interleave(times, dim=0)
                shape = [1] * h.dim()
                shape[0], shape[self.kind.rank_dim] = mask.shape
                self.masks[key] = mask.reshape(shape).to(h.device, h.dtype)
        return alongside(self.masks[key], h)


class _Alone:
    """One adapter whose change is no ``B A``: it is made for the rows that have it."""

    def __init__(self, term: Term, names: Sequence[str | None]) -> None:
        self.term = term
        self.rows = torch.tensor([i for i, name in enumerate(names) if name == term.adapter])

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, count: Count) -> Tensor:
        """The layer's output with what the adapter adds to its rows."""
        times, term = count(y, 2), self.term
        own: Any = layer._parameters
        entries = self.rows.unsqueeze(1) * times + torch.arange(times)
        at = entries.flatten().to(y.device)
        tensors = {role: own[name] for role, name in term.names.items()}
        require_values(layer, x, tensors.values())
        factor: Any = term.factor
        if term.drops and (drops := drops_now(layer, term.dropping)):
            factor, tensors = drops.factor(factor, y), drops.thinned(tensors)
        change = term.change(tensors, factor, dropout_now(layer, term))
        x_k, y_k = x.index_select(0, at), y.index_select(0, at)
        added = term.variant.add_to_output(term.kind, layer, x_k, y_k, y_k, change)
        return y.index_copy(0, at, added)


def _thinned(layer: nn.Module, term: Term) -> dict[str, Tensor]:
    """The tensors of an adapter, without the ranks that are left out in training."""
    own: Any = layer._parameters
    tensors = {role: own[name] for role, name in term.names.items()}
    drops = term.drops and drops_now(layer, term.dropping)
    return drops.folded(tensors) if drops else tensors
