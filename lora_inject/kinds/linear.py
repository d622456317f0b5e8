"""``nn.Linear`` and its subclasses.

A forward of their own is tried out: where ``W + D`` gives ``y + D x`` an adapter stands beside it,
where it does something else with its weight the adapter acts in the weight.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.linear import linear_down, linear_up
from lora_inject.compat.marks import is_known_linear
from lora_inject.kinds.base import (
    Changes,
    Form,
    Kind,
    Way,
    is_packed,
    is_plain,
    linear_spec,
    overrides_forward,
)
from lora_inject.kinds.multiplied import multiplied
from lora_inject.kinds.trials import Trial, try_linear, writes
from lora_inject.kinds.weight_reads import calls_super, reads_own_weight
from lora_inject.own import own_class, own_tensor
from lora_inject.settings import Settings
from lora_inject.variants import Spec, Variant

_FORWARD = nn.Linear.forward  # torch's own, whatever is put in its place later
_BLOCK = 256  # rows of the identity that a packed weight is read with at once


class LinearKind(Kind):
    """``y = W x + b`` with W of shape (out, in)."""

    name = "Linear"
    linear_like = True
    stacks = True
    has_parts = True
    has_rows = True
    in_products = "in its weight, or products if called"

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.Linear``, quantized subclasses with a forward of their own included."""
        return isinstance(module, nn.Linear)

    def way(self, module: nn.Module) -> Way:
        """Beside the forward, but for one that does more to its weight than to multiply by it."""
        if not self.has_own_forward(module):
            return "branch"
        trial = self._trial(module)
        return "branch" if trial is None or trial.adds or trial.problem else "weight"

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """A forward of its own must map (.., in) to (.., out), and leave its weight alone."""
        trial = self._trial(module) if self.has_own_forward(module) else None
        if trial is None:
            return None
        if way == "branch" and trial.problem:
            return (
                f"{own_class(module).__name__} has a forward of its own, beside which no adapter "
                f'can stand: {trial.problem}. Exclude it, or use how="weight".'
            )
        return writes(module) if way == "weight" and trial.writes else None

    def has_own_forward(self, module: nn.Module) -> bool:
        """Whether the class has a forward of which nothing is known."""
        return overrides_forward(module, nn.Linear)

    def _trial(self, module: nn.Module) -> Trial | None:
        """What a forward of its own was seen to do; None where that is known, or has no weight."""
        cls = own_class(module)
        if is_known_linear(cls) or not is_plain(module._parameters.get("weight")):
            return None
        trial = try_linear(module, *self.features(module), self.transposes, self.groups(module))
        # Then the branch stands below it, and whatever it does is done to both.
        below = trial.problem is None and self.branches_at(cls) is not None
        return trial._replace(adds=True) if below else trial

    def branches_at(self, base: type[nn.Module]) -> type[nn.Module] | None:
        """``nn.Linear``, below a forward that has the product made by ``super().forward``."""
        return nn.Linear if _is_above_linear(base) else None

    def is_product(self, base: type[nn.Module]) -> bool:
        """Classes that leave ``nn.Linear.forward`` as it is."""
        return base.forward is _FORWARD

    def multiplies(self, module: nn.Module, specs: Sequence[Spec], variant: Variant) -> bool:
        """Where the layer itself is called; what reads its weight otherwise sees ``W + s B A``."""
        return variant.additive and own_class(module).forward is _FORWARD

    def multiplied(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """What ``F.linear`` gets."""
        return multiplied(self, layer, W, changes)

    def form(self, layer: nn.Module) -> Form:
        """As PEFT has it."""
        return "linear"

    def groups(self, module: nn.Module) -> int:
        """How many groups the features that it writes are of, each of which reads its own."""
        return 1

    def features(self, module: nn.Module) -> tuple[int, int]:
        """From the weight, which may have been cut; a quantized one is packed: from attributes."""
        assert isinstance(module, nn.Linear)
        weight = module._parameters.get("weight")
        if is_plain(weight) and weight.dim() == 2:
            n_out, n_in = weight.shape
            return n_in, n_out
        return module.in_features, module.out_features

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair, or one for each named part of a fused projection."""
        n_in, n_out = self.features(module)
        if not settings.parts:
            return (linear_spec("weight", n_in, n_out, settings.r),)
        specs, start = [], 0
        for part, size in settings.part_sizes(n_out):
            shapes = (settings.r, n_in), (size, settings.r)
            if part is not None:
                specs.append(Spec("weight", n_in, size, *shapes, part=part, start=start))
            start += size
        return tuple(specs)

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """``A dropout(x)``."""
        return linear_down(x, A, dropout)

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``B h``."""
        return linear_up(h, B)

    def rows_refusal(self, layer: nn.Module) -> str | None:
        """They are the last dimension of the input, unless a forward of its own makes others."""
        return self.own_rows(layer)

    def input_rows(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """One for each token."""
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, layer: nn.Module, y: Tensor) -> Tensor:
        """One for each token."""
        return y.reshape(-1, y.shape[-1])

    def add_rows(
        self, layer: nn.Module, x: Tensor, y: Tensor, index: Tensor, rows: Tensor
    ) -> Tensor:
        """Of an output head: what comes out for these ids."""
        return y.index_add(-1, index, linear_down(x, rows, 0.0).to(y.dtype))

    def affine_refusal(self, layer: nn.Module) -> str | None:
        """A forward of its own may do anything to ``W x``, but for where the branch is below it."""
        cls, weight = own_class(layer), self.weight(layer, "weight")
        below = self.is_product(cls) or self.branches_at(cls) is not None
        if below or is_packed(weight):  # what is packed computes W x + b
            return None
        return f"{cls.__name__} has a forward of its own."

    def dense(self, layer: nn.Module, spec: Spec) -> Tensor | None:
        """A packed weight is what the layer's own forward makes of the identity."""
        if (plain := super().dense(layer, spec)) is not None:
            return plain
        if "weight" in getattr(layer, "parametrizations", ()):
            return None
        n_in, whole, own = self.features(layer)[0], replace(spec, part=""), dict(vars(layer))
        found = []
        try:
            for first in range(0, n_in, _BLOCK):
                rows = torch.zeros(min(_BLOCK, n_in - first), n_in, device=self._device(layer))
                rows[:, first : first + _BLOCK].fill_diagonal_(1)
                found.append(self.product(layer, whole, rows).float())
        finally:  # some layers remember the dtype of their first input
            vars(layer).clear()
            vars(layer).update(own)
        W_IO = torch.cat(found)
        return W_IO if self.transposes else W_IO.t().contiguous()

    @torch.no_grad()
    def product(self, layer: nn.Module, spec: Spec, rows: Tensor) -> Tensor:
        """What the layer computes, less its bias."""
        weight, bias = self.weight(layer, "weight"), own_tensor(layer, "bias")
        dtype = next((t.dtype for t in (weight, bias) if t is not None and t.is_floating_point()
                      and t.dtype.itemsize > 1), torch.float32)  # fmt: skip
        made: Tensor = own_class(layer).forward(layer, rows.to(dtype))
        made = made.float() if bias is None else made.float() - bias
        return made.narrow(-1, spec.start, spec.n_out) if spec.part else made

    def _device(self, layer: nn.Module) -> torch.device:
        return self.weight(layer, "weight").device

    def merge_refusal(self, module: nn.Module, base: type[nn.Module], way: Way) -> str | None:
        """A forward of its own that was not tried may do more to W x than to the branch."""
        own = not self.is_product(base) and self.has_own_forward(module)
        trial = self._trial(module) if own and way == "branch" else None
        if own and way == "branch" and (trial is None or not trial.adds):
            return f"{base.__name__} has a forward of its own, to which merging may do otherwise."
        return None


def _is_above_linear(base: type[nn.Module]) -> bool:
    """Whether a Linear class has a forward of its own that always calls ``super().forward``."""
    own = issubclass(base, nn.Linear) and base.forward is not nn.Linear.forward
    return own and calls_super(base, nn.Linear) and not reads_own_weight(base, nn.Linear)
