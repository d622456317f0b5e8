"""A Linear with groups of output features that read an input each: DeepSeek-V4's ``o_a_proj``."""

from torch import Tensor, einsum, nn

from lora_inject.arithmetic.product import cast_to
from lora_inject.kinds.base import Way
from lora_inject.kinds.linear import LinearKind

_COUNTS = ("n_groups", "num_groups", "groups")  # under which a layer says how many there are


class GroupedLinearKind(LinearKind):
    """``(.., groups, in)`` to ``(.., groups, out / groups)`` by rows of W (out, in) for each group.

    A (r, in) reads the inputs of all groups, and B (out, r) writes as W does, so that ``B A`` is
    added to W. A trial tells whether a layer does so, whatever it is called.
    """

    name = "grouped Linear"
    stacks = False
    has_parts = False
    has_rows = False

    def matches(self, module: nn.Module) -> bool:
        """A Linear with a forward of its own and a number of groups, seen to multiply by groups."""
        if not isinstance(module, nn.Linear) or self.groups(module) < 2:
            return False
        trial = self._trial(module) if self.has_own_forward(module) else None
        return trial is not None and trial.adds

    def way(self, module: nn.Module) -> Way:
        """Beside its forward."""
        return "branch"

    def groups(self, module: nn.Module) -> int:
        """What it says, where its features can be divided so."""
        counts = (count for name in _COUNTS if isinstance(count := vars(module).get(name), int))
        count = next(counts, 1)
        return count if count > 1 and self.features(module)[1] % count == 0 else 1

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``B h``, of each group by its own rows of B."""
        B_GOR = cast_to(B, h.dtype).view(self.groups(layer), -1, B.shape[-1])
        return einsum("...gr,gor->...go", h, B_GOR)

    def rows_refusal(self, layer: nn.Module) -> str | None:
        """An input of one group meets a part of the weight alone."""
        return "each group of its inputs is multiplied by rows of the weight of its own."
