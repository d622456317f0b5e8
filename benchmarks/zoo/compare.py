"""What a model of the zoo computes, and what it is, in forms that can be compared."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.models import run, tensors_of

CLOSE = 5e-3  # of what adapters change: parts of models compute in float32 whatever they are given


def outputs_of(model: nn.Module, inputs: dict[str, Any], backward: bool = False) -> list[Tensor]:
    """What a model returns; with gradients of a weighted sum of it where these are asked for."""
    with torch.set_grad_enabled(backward):
        outputs = tensors_of(run(model, inputs))
        if backward:
            generator = torch.Generator().manual_seed(3)
            total = torch.zeros(())
            for tensor in outputs:
                weights = torch.randn(tensor.shape, generator=generator)
                kept = torch.where(tensor.isfinite(), tensor.float(), 0.0)
                total = total + (kept * weights).sum() if tensor.requires_grad else total
            if total.requires_grad:
                total.backward()
    return [tensor.detach() for tensor in outputs]


def outputs_frozen(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What it returns with frozen parameters: torch chooses some of its kernels by that."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    outputs = outputs_of(model, inputs)
    for parameter in trained:
        parameter.requires_grad_(True)
    return outputs


def is_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two outputs are the same, bit for bit but for the kind of NaN."""
    same = len(one) == len(other)
    return same and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def is_close(one: list[Tensor], other: list[Tensor], base: list[Tensor]) -> bool:
    """Whether two outputs differ by little of what they differ from the base's."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    for a, b, c in zip(one, other, base, strict=True):
        a, b, c = (t.double().nan_to_num(0, 0, 0) for t in (a, b, c))
        least = 1e-4 * b.norm() + 1e-6
        if (a - b).norm() > max(CLOSE * (b - c).norm() if b.shape == c.shape else 0, least):
            return False
    return True


def _raw(tensor: Tensor) -> int:
    data = tensor.detach().reshape(-1).contiguous()
    return hash(data.view(torch.uint8).numpy().tobytes()) if data.numel() else 0


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What strip has to restore."""
    modules, tensors = list(model.named_modules()), dict(model.named_parameters())
    return {
        "modules": [(name, id(m), type(m)) for name, m in modules],
        "modes": [m.training for _, m in modules],
        "attributes": [sorted(vars(m)) for _, m in modules],
        "hooks": [
            (name, key, len(value))
            for name, m in modules
            for key, value in vars(m).items()
            if key.endswith("_hooks") and isinstance(value, dict)
        ],
        "parameters": [(n, id(p), p.requires_grad, p.grad is None) for n, p in tensors.items()],
        "values": [(name, _raw(p)) for name, p in tensors.items()],
        "buffers": [(name, _raw(b)) for name, b in model.named_buffers()],
    }
