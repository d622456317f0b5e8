"""Graph breaks and recompiles of a compiled model while adapters change."""

import tempfile

import torch
from torch import nn

from benchmarks.harness import Result, row
from benchmarks.peers import PROJECTIONS, randomize, small_llama
from lora_inject import inject, load, save, use


@row("compile")
def changes(rounds: int) -> list[Result]:
    graphs: list[object] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = small_llama().eval()
    inject(model, PROJECTIONS, r=8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counted, fullgraph=True)  # a break would raise
    ids = torch.randint(1000, (1, 8))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(5):
            other = small_llama()
            inject(other, PROJECTIONS, r=8, alpha=8 * (i + 1))
            save(randomize(other), f"{folder}/{i}")
        compiled(ids)
        first = len(graphs)
        swaps = _compiles(graphs, compiled, ids, lambda i: load(model, f"{folder}/{i}"))
        weights = _compiles(graphs, compiled, ids, lambda i: use(model, {"default": 0.9 - 0.1 * i}))
    torch.compiler.reset()
    goal = "0 graph breaks, 0 recompiles"
    return [
        Result("compile", f"Llama-small, fullgraph, 5 {what}",
               f"{first - 1} graph breaks, {count} recompiles", goal, first == 1 and count == 0)
        for what, count in (
            ("files of one rank and other scalings loaded in place", swaps),
            ("changes of scale by use(model, {adapter: weight})", weights),
        )
    ]  # fmt: skip


def _compiles(graphs: list[object], compiled: nn.Module, ids: torch.Tensor, change: object) -> int:
    before = len(graphs)
    for i in range(5):
        change(i)  # type: ignore[operator]
        compiled(ids)
    return len(graphs) - before
