"""What adapters cost in weights that are read and not called: torch's attention and its encoder."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.arithmetic import layer_step
from benchmarks.harness import Result, interleaved, row
from benchmarks.memory import bytes_kept
from benchmarks.peers import randomize
from lora_inject import inject

E, ROWS, R, MIB = 768, 256, 16, 2**20
Call = Callable[[nn.Module, Tensor], Tensor]


@row("attention")
def attention(rounds: int) -> list[Result]:
    encoder = nn.TransformerEncoderLayer(E, 12, 4 * E, dropout=0.0, batch_first=True)
    return [
        _result("nn.MultiheadAttention", encoder.self_attn, lambda m, x: m(x, x, x)[0], rounds),
        _result("nn.TransformerEncoderLayer", encoder, lambda m, x: m(x), rounds),  # type: ignore[no-any-return]
    ]


def _result(name: str, floor: nn.Module, call: Call, rounds: int) -> Result:
    floor = copy.deepcopy(floor).requires_grad_(False)
    ours = copy.deepcopy(floor)
    inject(ours, "all-linear", r=R)
    models = {"floor": floor, "ours": randomize(ours)}
    x, g = (torch.randn(1, ROWS, E) for _ in range(2))
    x.requires_grad_()
    steps = {
        name: layer_step(model, [(x, g)], lambda x, model=model: call(model, x))  # type: ignore[misc]
        for name, model in models.items()
    }
    timings = interleaved(steps, rounds)
    kept = {n: bytes_kept(lambda m=m: call(m, x)) / MIB for n, m in models.items()}  # type: ignore[misc]
    cost = timings.ratio("ours", "floor")
    value = f"{cost:.2f}x floor; kept {kept['ours']:.1f} MiB (floor {kept['floor']:.1f})"
    workload = f"{name} of {E}, {ROWS} rows, r={R} on all of it, forward + backward"
    return Result("attention", workload, value, "<= 1.25x floor", cost <= 1.25,
                  timings.over("floor"))  # fmt: skip
