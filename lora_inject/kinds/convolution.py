"""Convolutions and transposed convolutions of one to three dimensions.

A is a convolution with the layer's own geometry to r channels (r for each group), B is 1x1. So a
group's adapter has rank r, and the update of the weight is exact for every geometry:

    Conv           W (out, in/g, *k)   A (g r, in/g, *k)   B (out, r, 1..)
    ConvTranspose  W (in, out/g, *k)   A (in, r, *k)       B (out, r, 1..)
"""

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic import starting_values as initial
from lora_inject.kinds.base import Form, Kind, Way, is_plain, overrides_forward
from lora_inject.kinds.trials import writes, writing_refusal
from lora_inject.own import own_class
from lora_inject.settings import Settings
from lora_inject.variants import Spec

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_WIDEST = 4608  # values of a patch, 512 channels of 3 x 3: moments are a square of them
_KNOWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KNOWN_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ConvTransposeNd = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d | _ConvTransposeNd


class ConvKind(Kind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

    name = "Conv"
    rank_dim = 1  # of a batch: without one there are no rows either
    known: tuple[type[nn.Module], ...] = _KNOWN

    def matches(self, module: nn.Module) -> bool:
        """Instances of torch's convolutions."""
        return isinstance(module, self.known)

    def way(self, module: nn.Module) -> Way:
        """A subclass with a forward of its own may pad or standardize: only its weight is safe."""
        cls = own_class(module)
        same = [k for k in self.known if isinstance(module, k) and cls.forward is k.forward]
        known = bool(same) and _convolves_as(cls, same[0])
        return "branch" if known else "weight"

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """A forward that writes to its weight would write to the sum, which is gone afterwards."""
        if way == "branch" or not overrides_forward(module, self._torchs(module)):
            return None
        code = getattr(own_class(module).forward, "__code__", None)
        told = code is not None and {"weight", "data"} <= set(code.co_names)
        return writes(module) if told else writing_refusal(module, partial(_image, module))

    def _torchs(self, module: nn.Module) -> type[nn.Module]:
        return next(known for known in self.known if isinstance(module, known))

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair."""
        assert isinstance(module, _ConvNd)
        n_in, n_out, kernel = _sizes(module)
        A_shape = (settings.r * module.groups, n_in // module.groups, *kernel)
        B_shape = (n_out, settings.r, *_ones(kernel))
        return (Spec("weight", n_in, n_out, A_shape, B_shape, groups=module.groups),)

    def form(self, layer: nn.Module) -> Form:
        """PEFT forgets dilation and padding modes."""
        assert isinstance(layer, _ConvNd)
        plain = set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        return "conv" if plain else "other"

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """``A * dropout(x)``, * being the convolution of the layer."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        h: Tensor = layer._conv_forward(_drop(x, dropout), A.to(x.dtype), None)
        return h

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``B * h``, * being the 1x1 convolution."""
        assert isinstance(layer, _ConvNd)
        delta: Tensor = _CONVOLVE[B.dim() - 2](h, B.to(h.dtype), groups=layer.groups)
        return delta

    def to_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """One pair for each group, with A's kernel in its columns."""
        assert isinstance(layer, _ConvNd)
        g, r = layer.groups, B.shape[1]
        return A.reshape(g, r, -1), B.reshape(g, -1, r)

    def from_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel again, and B 1x1."""
        assert isinstance(layer, _ConvNd)
        n_in, n_out, kernel = _sizes(layer)
        shape = (layer.groups * A.shape[-2], n_in // layer.groups, *kernel)
        return A.reshape(shape), B.reshape(n_out, A.shape[-2], *_ones(kernel))

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """One matrix for each group."""
        assert isinstance(layer, _ConvNd)
        return W.reshape(layer.groups, _sizes(layer)[1] // layer.groups, -1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The kernel again."""
        return matrix.reshape(shape)

    def rows_refusal(self, layer: nn.Module) -> str | None:
        """A patch is a vector, unless it is very large."""
        patch = self._patch(layer)
        if patch > _WIDEST:
            return f"its patches have {patch:,} values, more than {_WIDEST:,}."
        return self.own_rows(layer)

    def input_rows(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The patches of each group: what A makes of the input where it is the identity."""
        assert isinstance(layer, _ConvNd)
        n, g = self._patch(layer), layer.groups
        unit = torch.eye(n, dtype=x.dtype, device=x.device).expand(g, n, n)
        A, _ = self.from_matrices(layer, unit, x.new_zeros(g, layer.out_channels // g, n))
        return self.output_rows(layer, self.down(layer, x, y, A, 0.0))

    def output_rows(self, layer: nn.Module, y: Tensor) -> Tensor:
        """The channels of each group, at every place."""
        assert isinstance(layer, _ConvNd)
        channels = y.movedim(-1 - len(layer.kernel_size), -1)
        rows = channels.reshape(-1, layer.groups, channels.shape[-1] // layer.groups)
        return rows.transpose(0, 1)

    def _patch(self, layer: nn.Module) -> int:
        """How many values a row of A is multiplied with."""
        assert isinstance(layer, _ConvNd)
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size)

    def beside_output(self, layer: nn.Module, vector: Tensor) -> Tensor:
        """Channels stand before the dimensions of the kernel."""
        assert isinstance(layer, _ConvNd)
        return vector.reshape(-1, *_ones(layer.kernel_size))


class ConvTransposeKind(ConvKind):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``."""

    name = "ConvTranspose"
    known = _KNOWN_TRANSPOSED

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair."""
        assert isinstance(module, _ConvTransposeNd)
        (n_in, n_out, kernel), r = _sizes(module), settings.r
        shapes = (n_in, r, *kernel), (n_out, r, *_ones(kernel))
        return (Spec("weight", n_in, n_out, *shapes, groups=module.groups),)

    def form(self, layer: nn.Module) -> Form:
        """No other library has them."""
        return "other"

    def initial(self, spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A kaiming-uniform over the channels and the kernel that A reads, B zero."""
        fan_in = math.prod(spec.A_shape[2:]) * spec.n_in
        A = initial.kaiming_uniform(spec.A_shape, fan_in, generator)
        return A, initial.zeros(spec.B_shape)

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """The same; the size of y decides the output padding, as ``output_size`` may have."""
        assert isinstance(layer, _ConvTransposeNd)
        n, options = len(layer.kernel_size), cast(Any, layer)
        geometry = zip(
            y.shape[-n:], x.shape[-n:], options.stride, options.padding, options.dilation,
            options.kernel_size, strict=True,
        )  # fmt: skip
        padding = [
            y_size - ((x_size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for y_size, x_size, stride, pad, dilation, kernel in geometry
        ]
        h: Tensor = _TRANSPOSED[n](
            _drop(x, dropout), A.to(x.dtype), None, options.stride, options.padding, padding,
            options.groups, options.dilation,
        )  # fmt: skip
        return h

    def to_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """One pair for each group; A's columns are its channels and kernel."""
        assert isinstance(layer, _ConvNd)
        g, r = layer.groups, B.shape[1]
        A_gIrk = A.reshape(g, -1, r, math.prod(layer.kernel_size))
        return A_gIrk.transpose(1, 2).reshape(g, r, -1), B.reshape(g, -1, r)

    def from_matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel again, and B 1x1."""
        assert isinstance(layer, _ConvNd)
        (_, n_out, kernel), g, r = _sizes(layer), layer.groups, A.shape[-2]
        A_gIrk = A.reshape(g, r, -1, math.prod(kernel)).transpose(1, 2)
        return A_gIrk.reshape(-1, r, *kernel), B.reshape(n_out, r, *_ones(kernel))

    def to_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """One matrix for each group, its channels the other way round."""
        assert isinstance(layer, _ConvNd)
        n_out, size = _sizes(layer)[1] // layer.groups, math.prod(layer.kernel_size)
        W_gIOk = W.reshape(layer.groups, -1, n_out, size)
        return W_gIOk.transpose(1, 2).reshape(layer.groups, n_out, -1)

    def from_matrix(self, layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The kernel again."""
        assert isinstance(layer, _ConvNd)
        n_out, size = _sizes(layer)[1] // layer.groups, math.prod(layer.kernel_size)
        W_gOIk = matrix.reshape(layer.groups, n_out, -1, size)
        return W_gOIk.transpose(1, 2).reshape(shape)


def _sizes(layer: _ConvNd) -> tuple[int, int, tuple[int, ...]]:
    """Channels in and out and the kernel, from the weight, which may have been cut since."""
    n_in, n_out, kernel = layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    weight = layer._parameters.get("weight")
    if is_plain(weight) and weight.dim() == 2 + len(kernel):
        first, second, *kernel_of_weight = weight.shape
        second *= layer.groups
        turned = isinstance(layer, _ConvTransposeNd)
        n_in, n_out = (first, second) if turned else (second, first)
        kernel = tuple(kernel_of_weight)
    return n_in, n_out, kernel


def _ones(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * len(kernel)


def _image(layer: Any, weight: Tensor) -> Tensor:
    """Something that a convolution can read: as large as its kernel and its padding want it."""
    reach = zip(layer.kernel_size, layer.dilation, strict=True)
    sizes = [(kernel - 1) * dilation + 8 for kernel, dilation in reach]
    return torch.randn(1, _sizes(layer)[0], *sizes, device=weight.device).to(weight.dtype)


def _convolves_as(cls: type[nn.Module], known: type[nn.Module]) -> bool:
    return getattr(cls, "_conv_forward", None) is getattr(known, "_conv_forward", None)


def _drop(x: Tensor, dropout: float) -> Tensor:
    return F.dropout(x, dropout) if dropout > 0 else x
