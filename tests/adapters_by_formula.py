"""What the stateful tests draw of adapters, and what these are to a weight by the papers' formulas.

Nothing of the package's own arithmetic is used: every matrix is made. The layers are Linear ones,
1-D convolutions and embeddings.
"""

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

# Arguments of ``inject`` besides targets, rank and what trains in place; most often none.
methods = st.fixed_dictionaries({
    "variant": st.sampled_from(["lora", "lora", "lora", "dora", "dora", "loha"]),
    "init": st.sampled_from(["default", "default", "default", "pissa", "olora", "mica"]),
    "scaling": st.sampled_from(["lora", "rslora"]),
    "fixed": st.sampled_from([None, None, None, None, "A", "B"]),
})  # fmt: skip
OTHER = {"A": "B", "B": "A"}
STARTS_ELSEWHERE = ("pissa", "olora")


def scaling_of(alpha, r, rule):
    """The factor of ``B A``."""
    return (alpha or r) / (math.sqrt(r) if rule == "rslora" else r)


def roles_of(variant, init):
    """The tensors of a pair."""
    start = ["A0", "B0"] if init in STARTS_ELSEWHERE else []
    return ["A", "B", *start, *{"dora": ["magnitude"], "loha": ["A2", "B2"]}.get(variant, [])]


def frozen_roles(init, fixed):
    """The tensors of a pair that never train."""
    return {"A0", "B0", fixed or ("B" if init == "mica" else None)} - {None}


def change(W, own, variant, scaling):
    """What the tensors of a pair, by role, add to the former weight W."""
    delta = own["B"].flatten(1) @ own["A"].flatten(1)
    if variant == "loha":
        delta = delta * (own["B2"] @ own["A2"])
    if "A0" in own:
        delta = delta - own["B0"].flatten(1) @ own["A0"].flatten(1)
    # An embedding keeps (ids, features); so does what is tied to one, the other way round.
    fits = W.dim() == 3 or delta.shape == W.shape
    delta = scaling * (delta.reshape(W.shape) if fits else delta.T)
    if variant != "dora":
        return delta
    V = W + delta
    if not fits:
        return V * (own["magnitude"] / V.norm(dim=0)) - W
    ratio = own["magnitude"] / V.flatten(1).norm(dim=1)
    return V * ratio.reshape(-1, *[1] * (W.dim() - 1)) - W


def randomize(parameter, role):
    """A value that matters: magnitudes stay near the lengths that they are."""
    with torch.no_grad():
        if role == "magnitude":
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=0.3)


@dataclass
class Values:
    """What is known of one adapter, apart from the model.

    Attributes:
        scaling: the factor of ``B A``.
        targets: the paths that it was asked for.
        variant: what its tensors are to a weight.
        roles: the tensors of a pair.
        never: those of them that do not train.
        turned: the paths where a file has brought the factors the other way round.
        ways: by path, whether it acts beside the layer's forward ("branch") or in its "weight".
        pairs: by path, the tensors by role.
        own: what it trains in place, by key.
        frozen: whether ``freeze`` has changed what it owns since.
    """

    scaling: float
    targets: set[str]
    variant: str = "lora"
    roles: tuple[str, ...] = ("A", "B")
    never: frozenset[str] = frozenset()
    turned: frozenset[str] = frozenset()
    ways: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: bool = False

    @property
    def rank(self):
        """The largest one of a layer, when it is written as a plain LoRA."""
        r = max(own["B"].shape[1] for own in self.pairs.values())
        return r * r if self.variant == "loha" else r * (2 if "A0" in self.roles else 1)

    def stays(self, path, role):
        """Whether a tensor never trains."""
        return (OTHER.get(role, role) if path in self.turned else role) in self.never

    def change(self, path, W):
        """What it adds to the former weight W."""
        return change(W, self.pairs[path], self.variant, self.scaling)
