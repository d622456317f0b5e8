"""LoftQ (arXiv 2310.08659): ``s B A`` begins as the best it can be of what quantizing has lost.

With Q what the layer multiplies with and W what it was: ``W - Q = U S V``, ``B = U_r sqrt(S_r /
s)`` and ``A = sqrt(S_r / s) V_r``. Nothing is subtracted: the outputs move, towards those of W.
This is one step of the paper's loop (T = 1); further ones would quantize the base anew, which is
not ours to change, and gain little.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError
from lora_inject.printing import Section, Shown, Tables
from lora_inject.starts.default import (
    Start,
    balanced,
    matrix_shape,
    of_matrices,
    rank_refusal,
    rows_of,
)
from lora_inject.starts.original import Original
from lora_inject.starts.pissa import PiSSA
from lora_inject.variants import LayerKind, Spec

_DIRECTIONS = PiSSA(power=8)  # what quantizing loses is nearly as large in every direction


@dataclass(frozen=True)
class LoftQ(Shown, Start):
    """What quantizing has lost, to rank r; ``print`` shows it for each layer, once it is used.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> start = LoftQ({"0.weight": model[0].weight.clone()})
        >>> with torch.no_grad():
        ...     _ = model[0].weight.mul_(8).round_().div_(8)
        >>> _ = inject(model, "0", r=2, alpha=4, init=start)
        >>> before, after = start.errors["0"]
        >>> after < before
        True

    Attributes:
        original: the weights before: a path of safetensors files, a state dict or a module.
        path: the layer's, once it is known.
        errors: by the path of each layer that has started so, ``|W - Q| / |W|`` and
            ``|W - Q - s B A| / |W|``.
    """

    original: Any = None
    path: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)
    name = "loftq"
    reads = True
    needs = "original"

    def __post_init__(self) -> None:
        if not isinstance(self.original, Original):
            object.__setattr__(self, "original", Original(self.original))

    def __deepcopy__(self, memo: Any) -> "LoftQ":
        return self

    def _tables(self) -> Tables:
        rows = [(path, f"{a:.4f}", f"{b:.4f}") for path, (a, b) in self.errors.items()]
        columns = ("~path", ">quantized", ">with s B A")
        return Tables([Section("LoftQ: what is lost, of the weight", columns, rows)])

    @property
    def note(self) -> str:
        """That it moves outputs, and what is left of the error."""
        if not self.errors:
            return ""
        each = zip(*self.errors.values(), strict=True)
        before, after = (sum(errors) / len(errors) for errors in each)
        return (
            'init="loftq" moves outputs, towards those of the original: of the weights '
            f"{before:.4f} was lost on average, and is {after:.4f} now."
        )

    def at(self, path: str) -> Start:
        """The same with the layer's path."""
        return replace(self, path=path)

    def zero(self, kind: LayerKind) -> str | None:
        """Neither."""
        return None

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """The original has to have it, and the layer to be whole."""
        key = self._key(spec)
        if key is None:
            return (
                f'init="loftq": the original has no {self.path}.{spec.weight} (a pickled model '
                "keeps none but a path). Give init=LoftQ(original), with the names of this model."
            )
        shape = self.original.shape(key)
        if shape is None:
            return f'init="loftq": the original {key} is quantized itself.'
        own = matrix_shape(kind, layer, spec)
        weight = layer._parameters.get(spec.weight)
        if weight is not None and weight.is_floating_point():  # packed ones show their shape too
            fits = shape == tuple(weight.shape)
        else:
            n_out = shape[0] if len(shape) == 2 else 0
            enough = n_out >= spec.start + own[0] if spec.part else n_out == own[0]
            fits = enough and shape[1] == own[1]
        if not fits:
            return f'init="loftq": the original {key} has the shape {shape}.'
        return rank_refusal(self.name, spec, own)

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_r``."""
        key = self._key(spec)
        if key is None:
            raise LoRAInjectError('init="loftq": the original is not there.', path=self.path)
        Q_OI = rows_of(kind, layer, W, spec)
        W_OI = rows_of(kind, layer, self.original.tensor(key).to(Q_OI.device), spec)
        lost_OI = W_OI - Q_OI
        U_OR, S_R, V_IR = _DIRECTIONS.directions(lost_OI, spec.rank, generator)
        size, lost = float(W_OI.norm()), float(lost_OI.norm())
        left = max(0.0, lost**2 - float(S_R.square().sum())) ** 0.5
        label = f"{self.path} ({spec.part})" if spec.part else self.path
        self.errors[label] = (lost / max(size, 1e-30), left / max(size, 1e-30))
        A_RI, B_OR = balanced(U_OR, S_R, V_IR, scaling)
        # Where nothing was lost, A starts as usual: two zeros would never learn.
        usual, _ = kind.to_matrices(layer, *kind.initial(spec, generator))
        learns = (S_R / max(size, 1e-30) > torch.finfo(S_R.dtype).eps).unsqueeze(-1)
        A_RI = torch.where(learns, A_RI, usual.to(A_RI))
        return of_matrices(kind, layer, A_RI, torch.where(learns.mT, B_OR, 0))

    def _key(self, spec: Spec) -> str | None:
        """The name of the weight in the original; a parameter that is a target is its own path."""
        names = (f"{self.path}.{spec.weight}".lstrip("."), self.path)
        return next((name for name in names if name in self.original), None)
