"""Several adapters: switching between them, and a different one for each row of a batch."""

import copy

import torch
from torch import nn

from benchmarks.harness import Result, interleaved, row
from lora_inject import inject, per_row, use

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nn.Module):
    """The modules of a decoder block of which seven are Linear; never called."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(f"{name}_proj", nn.Linear(dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])


@row("switch")
def switching(rounds: int) -> list[Result]:
    import peft

    ours = nn.Sequential(*(Block(32) for _ in range(48)))
    config = peft.LoraConfig(r=8, target_modules=[f"{name}_proj" for name in PROJECTIONS])
    theirs = peft.get_peft_model(copy.deepcopy(ours), config, adapter_name="a")
    theirs.add_adapter("b", config)
    for name in ("a", "b"):
        inject(ours, nn.Linear, r=8, adapter=name)

    def our_switches() -> None:
        use(ours, "a")
        use(ours, "b")

    def their_switches() -> None:
        theirs.set_adapter("a")
        theirs.set_adapter("b")

    our_time, their_time = interleaved([our_switches, their_switches], rounds)
    faster = their_time / our_time
    workload = "switch adapters on 336 layers, beside PEFT"
    value = f"{faster:.0f}x faster, {1000 * our_time / 2:.1f} ms"
    return [Result("switch", workload, value, ">= 20x faster", faster >= 20)]


@row("per-row")
def sixteen_adapters(rounds: int) -> list[Result]:
    import peft

    plain = nn.Linear(768, 768).requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(plain))
    names = [f"a{i}" for i in range(16)]
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(plain)), config, adapter_name="a0")
    for name in names:
        inject(ours, "0", r=8, adapter=name)
        if name not in theirs.peft_config:
            theirs.add_adapter(name, config)
    theirs.eval()
    x = torch.randn(16, 768)
    with torch.no_grad(), per_row(ours, names):
        floor, our_time, their_time = interleaved(
            [
                lambda: [plain(x) for _ in range(20)],
                lambda: [ours[0](x) for _ in range(20)],
                lambda: [theirs(x, adapter_names=names) for _ in range(20)],
            ],
            4 * rounds,
        )
    cost, theirs_cost = our_time / floor, their_time / floor
    workload = "16 adapters r=8 on 16 rows of 768x768, beside the plain layer"
    value = f"{cost:.2f}x (PEFT {theirs_cost:.1f}x)"
    return [Result("per-row", workload, value, "<= 2x", cost <= 2)]
