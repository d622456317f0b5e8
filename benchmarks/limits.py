"""The least that a layer can take, in two ways: counted, and measured part by part.

Counted: every product takes its operations over the machine's matrix rate, or its bytes over the
copy bandwidth, whichever is longer. Measured: the same products one after another on the layer's
own tensors, without autograd and without a layer around them.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Action, Clock
from lora_inject import LoRALayer
from lora_inject.arithmetic.masks import HASHED, LANES


@dataclass(frozen=True)
class Ceilings:
    """What was measured of a machine: bytes read and written, and operations, a second."""

    bandwidth: float
    rate: float

    def seconds(self, passes: "list[Pass]") -> float:
        """What some products take at least, one after another."""
        return sum(max(p.operations / self.rate, p.bytes / self.bandwidth) for p in passes)


def measured_ceilings(device: str, clock: Clock, elements: int, d: int) -> Ceilings:
    """Copy some elements of bfloat16, and multiply matrices of d x d, with random values."""
    source = torch.randn(elements, device=device).bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(d, d, device=device).bfloat16() for _ in range(2))

    def fastest(action: Action) -> float:
        times = [clock(action) for _ in range(12)]
        return statistics.median(times[2:])

    copied = fastest(lambda: target.copy_(source))
    multiplied = fastest(lambda: a @ b)
    return Ceilings(2 * source.nbytes / copied, 2 * d**3 / multiplied)


@dataclass(frozen=True)
class Pass:
    """One product, and what it cannot do without.

    Attributes:
        what: the product.
        operations: of floating point.
        bytes: read and written.
        adds: whether it adds to what the layer's own product has just written, which a product
            with an epilogue of its own could do in passing; torch's libraries have none.
    """

    what: str
    operations: float
    bytes: float
    adds: bool = False


def adapter_passes(
    rows: int, i: int, o: int, r: int, width: int = 2, *, factors: int = 1, backward: bool = True
) -> list[Pass]:
    """What adapters add to a frozen layer, each product beside the layer's own ones.

    Dropout adds nothing: a mask may be made from a seed while x is read. N are the rows:

    =================  ==========  ==================  ==========================
    product            operations  activations         note
    =================  ==========  ==================  ==========================
    h = A x            2 N r i     read N i            beside the layer's own read
    y += B h           2 N r o     read, write N o
    t = g B, h^T g     4 N r o     read N o            both in one pass
    dA = t^T x         2 N r i     read N i
    dx += t A          2 N r i     read, write N i
    =================  ==========  ==================  ==========================

    Args:
        rows: rows of the input.
        i: features in.
        o: features out.
        r: the rank.
        width: bytes of an element.
        factors: how many pairs A, B there are, each of which is read (and its gradient written).
        backward: whether there is a backward pass.
    """
    A, B = factors * r * i, factors * r * o
    forward = [
        Pass("h = A x", 2.0 * rows * r * i, width * (rows * i + A)),
        Pass("y += B h", 2.0 * rows * r * o, width * (2 * rows * o + B), adds=True),
    ]
    if not backward:
        return forward
    return [
        *forward,
        Pass("t = g B, dB = h^T g", 4.0 * rows * r * o, width * (rows * o + 2 * B)),
        Pass("dA = t^T x", 2.0 * rows * r * i, width * (rows * i + A)),
        Pass("dx += t A", 2.0 * rows * r * i, width * (2 * rows * i + A), adds=True),
    ]


def parts(layer: nn.Module, pairs: Iterator[tuple[Tensor, Tensor]], dropout: float = 0.0) -> Action:
    """The products of an adapted Linear in training, and nothing else.

    Args:
        layer: with a weight, a bias, and one adapter with a scaling of 1.
        pairs: inputs and gradients of outputs, matrices.
        dropout: of the adapter, on a CPU.
    """
    W, b = layer.weight.detach(), layer.bias.detach()
    A, B = (factor.detach().to(W.dtype) for factor in (layer.lora_A, layer.lora_B))

    @torch.no_grad()
    def step() -> None:
        x, g = next(pairs)
        dx = adapter_parts(x, g, F.linear(x, W, b), A, B, dropout)
        dx.addmm_(g, W)  # the large product adds to the small one, and not the other way round

    return step


def products(layer: nn.Module, x: Tensor, g: Tensor) -> Action:
    """The two products of a frozen Linear in training, and nothing else."""
    x, W, b = x.detach(), layer.weight.detach(), layer.bias.detach()
    return lambda: (F.linear(x, W, b), g @ W)


def adapter_parts(
    x: Tensor, g: Tensor, y: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0
) -> Tensor:
    """What an adapter cannot do without beside the two products of a frozen layer.

    With dropout also the mask, which is made in each direction, and a pass for what it masks.

    Args:
        x: the input, a matrix.
        g: the gradient of the output.
        y: the frozen layer's output, to which the adapter's is added.
        A: the factor.
        B: the other one.
        dropout: the probability; with one, on a CPU.

    Returns:
        What the adapter adds to the gradient of x, for the layer's own product to add to.
    """
    if not dropout:
        h = F.linear(x, A)
        y.addmm_(h, B.t())
        t = _times(g, B)
        h.t() @ g
        t.t() @ x
        return t @ A
    dropped = round(dropout * LANES)
    seeds, scale = HASHED.draw_seeds(x), LANES / (LANES - dropped)
    h = F.linear(HASHED.kept(x.shape, x.dtype, dropped, seeds).mul_(x), A).mul_(scale)
    y.addmm_(h, B.t())
    t = _times(g, B).mul_(scale)
    h.t() @ g
    kept = HASHED.kept(x.shape, x.dtype, dropped, seeds)
    dx = (t @ A).mul_(kept)
    t.t() @ kept.mul_(x)
    return dx


def _times(g: Tensor, B: Tensor) -> Tensor:
    """The narrow product g B, on a CPU the way round in which it is faster."""
    return (B.t() @ g.t()).t() if g.is_cpu else g @ B


def model_parts(model: nn.Module, rows: int, dropout: float) -> Action:
    """The parts of all adapted Linear layers of a model, one layer after the other.

    Args:
        model: with one adapter that has a scaling of 1.
        rows: how many rows every layer's input has.
        dropout: of the adapters.
    """
    layers = [m for m in model.modules() if isinstance(m, LoRALayer)]
    factors = [(m.lora_A.detach(), m.lora_B.detach()) for m in layers]
    shapes = {(A.shape[1], B.shape[0]) for A, B in factors}
    # Layers of one shape share x, g and y: what counts is how large they are.
    values = {(i, o): [torch.randn(rows, n) for n in (i, o, o)] for i, o in shapes}

    @torch.no_grad()
    def step() -> None:
        for A, B in factors:
            adapter_parts(*values[A.shape[1], B.shape[0]], A, B, dropout)

    return step
