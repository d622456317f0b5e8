"""What a class with a forward of its own does to its weight: tried out on a copy.

A layer may mask, norm or group its weight, return a tuple or write to what it reads. No name tells.
The copy has random values, masks and scales included, which may be set to other values later; the
layer itself is never called. Classes that are known are never tried.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_inject.kinds.base import is_plain
from lora_inject.own import STATE, own_class

_ROWS = 16  # of the input; float8 products want a multiple of it
_ROUNDING = 0.1  # of a product: a forward may round to eight bits
_ROUNDING_OF_ENTRIES = 0.25


class Trial(NamedTuple):
    """What was seen.

    Attributes:
        problem: why it does not map (.., in) to (.., out), in words; None where it does.
        adds: whether the weight W + D gives y + D x: an adapter beside the forward is then right.
        writes: whether its weight is another one after the forward.
    """

    problem: str | None
    adds: bool
    writes: bool


# By class, then by what of an instance may matter.
_known: WeakKeyDictionary[type, dict[Any, Trial]] = WeakKeyDictionary()


def try_linear(
    module: nn.Module, n_in: int, n_out: int, transposed: bool, groups: int = 1
) -> Trial:
    """Try out a layer that is to map (.., in) to (.., out) by its ``weight``.

    Args:
        module: the layer.
        n_in: features that it reads.
        n_out: features that it writes.
        transposed: whether the weight is (in, out).
        groups: with more than one it is to map (.., groups, in) to (.., groups, out / groups), and
            each group by rows of the weight of its own.
    """

    def run() -> Trial:
        return _try_linear(module, n_in, n_out, transposed, groups)

    return _once(module, (n_in, n_out, transposed, groups), run)


def writing_refusal(module: nn.Module, inputs: Callable[[Tensor], Tensor]) -> str | None:
    """Why a layer whose forward writes to its ``weight`` cannot be adapted there; else None.

    Args:
        module: the layer, with a weight to which something can be added.
        inputs: makes an input of the weight. What does not take it counts as one that writes not.
    """
    if not is_plain(module._parameters.get("weight")):
        return None

    def run() -> Trial:
        with _quietly(module):
            copy = _copy(module)
            before = copy._parameters["weight"].clone()  # type: ignore[union-attr]
            own_class(module).forward(copy, inputs(before))
            return Trial(None, adds=False, writes=_is_other(copy, before))

    return writes(module) if _once(module, "writes", run).writes else None


def writes(module: nn.Module) -> str:
    """The sentence for a layer that writes to its weight."""
    return (
        f"the forward of {own_class(module).__name__} writes to its weight, of which an adapter "
        "makes another one for each forward. Exclude it."
    )


def _once(module: nn.Module, what: Any, run: Callable[[], Trial]) -> Trial:
    """The trial of the class and of instances like this one."""
    own = _known.setdefault(own_class(module), {})
    plain = (bool, int, float, str, type(None))
    facts = tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, plain))
    tensors = tuple(
        (name, None if tensor is None else (tensor.shape, tensor.dtype, tensor.device))
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
    )
    key = (what, facts, tensors)
    if key not in own:
        try:
            own[key] = run()
        except Exception as error:
            problem = f"it could not be tried out: {_said(error)}"
            own[key] = Trial(problem, adds=False, writes=False)
    return own[key]


def _try_linear(module: nn.Module, n_in: int, n_out: int, transposed: bool, groups: int) -> Trial:
    with _quietly(module):
        copy = _copy(module)
        own: Any = copy._parameters
        W = own["weight"].clone()
        D_OI = (torch.rand(n_out, n_in, device=W.device) + 1) * (
            torch.randint(0, 2, (n_out, n_in), device=W.device) * 2 - 1
        )
        added = (D_OI.T if transposed else D_OI).to(W.dtype)
        problem: str | None = None
        last = (groups, n_in) if groups > 1 else (n_in,)
        for shape in ((2, _ROWS, *last), (2 * _ROWS, *last)):
            x = _rows(shape, W)
            outputs, writes = [], False
            try:
                for weight in (W, W + added):
                    own["weight"].copy_(weight)
                    torch.manual_seed(0)
                    outputs.append(own_class(module).forward(copy, *_inputs(module, x)))
                    writes |= _is_other(copy, weight)
            except Exception as error:
                problem = problem or f"its forward fails on {_text(shape)}: {_said(error)}"
                continue
            return _judged(outputs, x, D_OI.view(groups, -1, n_in), writes)
    return Trial(problem, adds=False, writes=False)


def _inputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The input for every argument that forward wants: gates and the like are of its shape."""
    wanted = list(inspect.signature(own_class(module).forward).parameters.values())[1:]
    count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                for p in wanted)  # fmt: skip
    return [x.clone() for _ in range(max(1, count))]


def _judged(outputs: list[Any], x: Tensor, D_GOI: Tensor, writes: bool) -> Trial:
    """What the outputs with W and with W + D say, of which each group has a part."""
    y, other = outputs
    shape = (*x.shape[:-1], D_GOI.shape[1])
    if not isinstance(y, Tensor):
        return Trial(f"it returns a {type(y).__name__}", False, writes)
    if tuple(y.shape) != shape:
        return Trial(f"it makes {_text(y.shape)} of {_text(x.shape)}", False, writes)
    found = (other.float() - y.float()).flatten(0, -2)
    each = x.float().reshape(-1, len(D_GOI), x.shape[-1])
    wanted = torch.einsum("ngi,goi->ngo", each, D_GOI).flatten(0, 1)
    off = found - wanted
    close = bool(off.norm() <= _ROUNDING * wanted.norm())
    # Rows in which one feature is 1 show single entries of D, each of which is 1 or more.
    single = x.flatten(0, -2).count_nonzero(-1) == 1
    near = bool((off[single].abs() <= _ROUNDING_OF_ENTRIES).all())
    return Trial(None, adds=close and near, writes=writes)


def _rows(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Half of the rows random, and half with a single 1, at features that are spread out."""
    x = torch.randn(shape, device=like.device).flatten(0, -2)
    half, n_in = len(x) // 2, shape[-1]
    x[half:] = 0
    features = torch.randperm(n_in, device=like.device).repeat(half)[:half]
    x[torch.arange(half, 2 * half, device=like.device), features] = 1
    return x.reshape(shape).to(like.dtype)


def _is_other(copy: nn.Module, weight: Tensor) -> bool:
    now = copy._parameters.get("weight")
    return now is None or now.shape != weight.shape or not torch.equal(now, weight)


def _copy(module: nn.Module) -> nn.Module:
    """The layer with random values and without hooks and adapters; of the same values share it."""
    cls = own_class(module)
    copy: nn.Module = cls.__new__(cls)
    for name, value in module.__dict__.items():
        if name == STATE:
            continue
        if name.endswith("_hooks") and isinstance(value, dict):
            value = type(value)()
        elif name in ("_parameters", "_buffers"):
            value = {key: _random(tensor, name) for key, tensor in value.items()}
        elif isinstance(value, Tensor):
            value = _random(value)
        elif isinstance(value, (dict, list, set)):
            value = value.copy()
        copy.__dict__[name] = value
    copy.__dict__["_modules"] = {
        key: None if child is None else _copy(child) for key, child in module._modules.items()
    }
    copy.__dict__["training"] = True
    return copy


def _random(tensor: Tensor | None, owned: str = "") -> Any:
    """A tensor with other values: random ones, and of ones and zeros others of these."""
    if tensor is None:
        return None
    device = "cpu" if tensor.is_meta else tensor.device
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        value = torch.randn(tensor.shape, device=device).to(tensor.dtype)
    elif tensor.is_meta:
        value = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    elif tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all()):
        value = torch.randint(0, 2, tensor.shape, device=device).to(tensor.dtype)
    else:
        value = tensor.clone()
    return nn.Parameter(value, requires_grad=False) if owned == "_parameters" else value


@contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Without gradients, autocast and warnings, and with random numbers of its own."""
    weight: Any = module._parameters["weight"]
    kind = weight.device.type
    devices = [weight.device] if kind == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu" if kind == "meta" else kind, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _text(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"


def _said(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
