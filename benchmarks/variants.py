"""Variants of LoRA and starts that read the weight: what they cost, beside plain LoRA and PEFT."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.harness import Result, interleaved, row, seconds
from lora_inject import inject
from lora_inject.starts import PiSSA


def _kept(call: Callable[[], Tensor], own: nn.Module, x: Tensor) -> int:
    """The bytes that a forward pass keeps, its input, its output and parameters left out."""
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    known = {t.untyped_storage().data_ptr() for t in [*own.parameters(), x, y]}
    return sum(storage.nbytes() for address, storage in found.items() if address not in known)


@row("dora")
def dora(rounds: int) -> list[Result]:
    import peft

    plain = nn.Sequential(nn.Linear(1024, 1024))
    models: dict[str, Any] = {"LoRA": copy.deepcopy(plain), "ours": copy.deepcopy(plain)}
    inject(models["LoRA"], "0", r=8)
    inject(models["ours"], "0", r=8, variant="dora")
    config = peft.LoraConfig(r=8, target_modules=["0"], use_dora=True)
    models["PEFT"] = peft.get_peft_model(copy.deepcopy(plain), config)
    x = torch.randn(512, 1024, requires_grad=True)
    g = torch.randn(512, 1024)

    def step(model: nn.Module) -> Callable[[], None]:
        return lambda: torch.autograd.backward(model(x), g)

    actions = {name: step(model) for name, model in models.items()}
    timings = interleaved(actions, 4 * rounds, 3)
    cost, theirs = timings.ratio("ours", "LoRA"), timings.ratio("PEFT", "LoRA")
    kept = {name: _kept(lambda m=model: m(x), model, x) for name, model in models.items()}
    more = {name: (kept[name] - kept["LoRA"]) / 1e6 for name in kept}
    workload = "DoRA, forward and backward, 1024x1024 r=8, 512 rows, beside plain LoRA"
    return [
        Result("dora", workload, f"{cost:.2f}x of LoRA (PEFT {theirs:.2f}x)", "<= 1.25x of LoRA",
               cost <= 1.25, timings.over("LoRA")),
        Result("dora", "the same: bytes kept for backward over plain LoRA's",
               f"{more['ours']:.2f} MB (PEFT {more['PEFT']:.2f} MB)", "< 2 MB", more["ours"] < 2,
               profile="one tensor of the layer's output in float32, of which the gradient of the "
               "magnitude is made; nothing of the weight's size."),
    ]  # fmt: skip


@row("pissa")
def pissa(rounds: int) -> list[Result]:
    import peft

    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(4096, 512)).Q for _ in range(2))
    W = (U * torch.arange(1, 513).pow(-0.7)) @ V.mT + 1e-3 * torch.randn(4096, 4096)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(W)
    leading = torch.svd_lowrank(W, q=64, niter=8)[1][:16]  # exact to the digits that are shown
    best = (W.square().sum() - leading.square().sum()).sqrt().item()
    ours: Any = copy.deepcopy(model)
    taken = {"ours": seconds(lambda: inject(ours, "0", r=16, init=PiSSA()))}
    left = {"ours": W - ours[0].lora_B0.detach() @ ours[0].lora_A0.detach()}
    for name in ("pissa_niter_4", "pissa_niter_16"):
        theirs: Any = copy.deepcopy(model)
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["0"], init_lora_weights=name)
        taken[name] = seconds(lambda c=config, t=theirs: peft.get_peft_model(t, c))
        left[name] = theirs[0].base_layer.weight.detach()
    residual = {name: tensor.norm().item() / best for name, tensor in left.items()}
    shown = ", ".join(f"{n} {taken[n]:.1f} s, {residual[n]:.4f}" for n in list(taken)[1:])
    value = f"{taken['ours']:.1f} s, {residual['ours']:.4f} of the best residual (PEFT: {shown})"
    fair = residual["ours"] <= residual["pissa_niter_4"] + 5e-4
    met = fair and taken["ours"] < taken["pissa_niter_4"]
    workload, goal = "PiSSA start of a 4096x4096 layer, r=16", "less than PEFT's time, as near"
    return [Result("pissa", workload, value, goal, met)]
