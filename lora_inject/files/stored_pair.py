"""One pair of an adapter where it stands in a model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic.low_rank import same_product
from lora_inject.core.adapter import Adapter, Pair
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData
from lora_inject.kinds import Kind
from lora_inject.variants import Spec, Variant


class StoredPair(NamedTuple):
    """One pair of an adapter where it stands."""

    path: str
    layer: nn.Module
    adapter: Adapter
    pair: Pair

    @property
    def spec(self) -> Spec:
        """The weight that it is for, and its shapes."""
        return self.pair.spec

    @property
    def variant(self) -> Variant:
        """What its tensors are to the weight."""
        return self.adapter.settings.variant

    @property
    def key(self) -> str:
        """The start of loralib's keys for it: the path and the prefix of what is not a weight."""
        return f"{self.path}.{self.spec.prefix}".lstrip(".")

    @property
    def keys(self) -> dict[str, str]:
        """The key of each tensor, by role."""
        return {role: f"{self.key}lora_{role}" for role in self.pair.names}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role."""
        return {**self.pair.tensors(self.layer)}

    def oriented(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the layer's kind wants them: those of a tied layer may stand the other way."""
        if not self.spec.swapped:
            return {**tensors}
        turned = self.variant.turned(tensors)
        return {role: turned[role] for role in tensors}

    @property
    def untold(self) -> dict[str, Any]:
        """What the tensors of a variant with shapes of its own need not tell of it."""
        if not self.variant.own_shapes:
            return {}
        kernel = () if self.spec.experts else self.spec.A_shape[2:]
        return {"r": self.adapter.settings.r, "kernel": kernel}

    def fitted(self, tensors: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
        """Values of a smaller rank padded with zeros, and of another scaling with it in B."""
        fitted, own = {**tensors}, self.adapter.settings.scaling
        for A, B in self._products():
            if scaling != own:
                fitted[B] = (fitted[B].double() * (scaling / own)).to(fitted[B].dtype)
            if not self.variant.own_shapes:
                fitted[A], fitted[B] = self._padded(fitted[A], fitted[B])
        return fitted

    def _products(self) -> Iterator[tuple[str, str]]:
        """The roles of the factors that are multiplied."""
        if "A" in self.variant.roles:
            yield "A", "B"
        if self.variant.offset:
            yield "A0", "B0"

    def _padded(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        spec, rank_dim = self.spec, 2 if self.spec.experts else 1
        kind: Kind = self.adapter.kind
        same = tuple(A.shape) == spec.A_shape and tuple(B.shape) == spec.B_shape
        if same or B.dim() != len(spec.B_shape) or not 0 < B.shape[rank_dim] < spec.rank:
            return A, B
        try:
            A_m, B_m = kind.to_matrices(self.layer, A, B)
        except RuntimeError:  # of shapes that are no smaller rank of this layer's
            return A, B
        extra = spec.rank - B.shape[rank_dim]
        A_m, B_m = F.pad(A_m, (0, 0, 0, extra)), F.pad(B_m, (0, extra))
        if A_m.numel() != self.tensors["A"].numel():
            return A, B
        return kind.from_matrices(self.layer, A_m, B_m)


def is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], product: bool) -> bool:
    """Whether the tensors of two pairs, by role, are one update.

    Args:
        one: the tensors of one pair.
        other: those of the other.
        product: whether A and B are known by their product.
    """
    product = product and "A" in one
    if product and not same_product((one["A"], one["B"]), (other["A"], other["B"])):
        return False
    rest = [role for role in one if not product or role not in ("A", "B")]
    return all(
        one[role].shape == other[role].shape
        and torch.allclose(one[role], other[role].to(one[role])) for role in rest
    )  # fmt: skip


def is_same_update(one: PairData, other: PairData) -> bool:
    """Whether two pairs are one, the same way round or the other."""
    factor = other.scaling / one.scaling
    if one.variant != "lora" or other.variant != "lora":
        mine, theirs = one.tensors, other.tensors
        if one.variant != other.variant or mine.keys() != theirs.keys():
            return False
        return is_same(mine, {**theirs, "B": theirs["B"] * factor}, not one.has_own_shapes)
    A, B = other.A, other.B * factor
    turned = B.transpose(-2, -1), A.transpose(-2, -1)
    return any(same_product((one.A, one.B), pair) for pair in ((A, B), turned))


def require_agreement(
    pairs: Sequence[StoredPair],
    own: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    scalings: Mapping[str, float],
) -> None:
    """Refuse values of a tied place that are not those of the place whose pair it shares."""
    for held in pairs:
        if not (held.adapter.follows and all(key in shared for key in held.keys.values())):
            continue
        one, *_ = held.tensors.values()
        leader = next(h for h in pairs if not h.adapter.follows
                      and any(one is each for each in h.tensors.values()))  # fmt: skip
        theirs = {role: own[key] for role, key in leader.keys.items()}
        mine = {role: shared[key] for role, key in held.keys.items()}
        scaling = held.adapter.settings.scaling
        if "B" in mine:
            mine["B"] = mine["B"] * (scalings.get(held.key, scaling) / scaling)
        product = not held.variant.own_shapes
        # As the layer wants them, or the very tensors that it shares.
        if not any(is_same(each, mine, product) for each in (held.oriented(theirs), theirs)):
            raise FormatError(
                f"{held.path} and {leader.path} are tied in this model and have different "
                "adapters here.",
                remedy="Nothing was loaded.",
            )
