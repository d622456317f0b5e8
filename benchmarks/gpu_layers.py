"""Rows for a GPU: one layer, fused experts, a batch whose rows have their own adapters.

Every row is a generator of lines, since the first of them are kept when a later one fails.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch
from torch import nn

from benchmarks.arithmetic import Case, adapted, forward_of, layer_step
from benchmarks.bench import BF16, Bench, against, attempted, shown, working
from benchmarks.experts import FusedExperts, Sizes, adapted_by_peft
from benchmarks.experts import adapted as adapted_experts
from benchmarks.harness import Result
from benchmarks.limits import adapter_passes, parts
from benchmarks.peers import EagerExperts, randomize
from benchmarks.ways import WAYS, WAYS_OF_DROPOUT
from lora_inject import inject, per_row, use


def layer(bench: Bench, dropout: float, wide: bool, goal: float) -> Iterator[Result]:
    """One Linear, forward and backward: as it is called, and as a CUDA graph.

    A single layer keeps a fast GPU waiting for its launches; in a graph only the GPU's work counts,
    as where other layers keep it busy meanwhile.
    """
    rows, d, r = bench.pick((4096, 4096, 16), (8, 32, 16))
    case = Case(rows, d, r, dropout, dtype=BF16, adapters=torch.float32 if wide else BF16)
    models = adapted(nn.Linear(d, d, device=bench.device, dtype=BF16), [], case)
    pairs, ways = bench.pairs(rows, d), WAYS_OF_DROPOUT if dropout else WAYS
    passes = adapter_passes(rows, d, d, r)
    limits = {
        "extra": bench.ceilings.seconds(passes),
        "fused": bench.ceilings.seconds([p for p in passes if not p.adds]),
    }
    notes = ["the plain composition has no other dtype than its layer"] if wide else []
    what = "fp32 adapters" if wide else f"p={dropout:g}"
    workload = f"layer {d}x{d} bf16, {rows:,} rows, r={r}, forward + backward: {what}"
    for graphs in (False, True):
        steps = {name: layer_step(model, pairs) for name, model in models.items()}
        ours = {way: layer_step(models["ours"], pairs) for way in ways}
        steps = {**steps, **ours, "parts alone": parts(models["ours"][0], cycle(pairs))}
        steps, failures = working(bench.graphed(steps) if graphs else steps, ways)
        timings = bench.timed(steps, 10, around=ways)
        how = ", in CUDA graphs" if graphs else ""
        yield against("layer", workload + how, timings, goal, notes=[*notes, *failures], **limits)


def experts(bench: Bench) -> Iterator[Result]:
    """Fused experts, forward and backward."""
    tokens, r = bench.pick(4096, 8), 16
    sizes = Sizes(*bench.pick((128, 2048, 768, 8), (4, 32, 16, 2)))
    count, hidden, width, top = sizes
    floor = FusedExperts(sizes, tokens, BF16, bench.device).requires_grad_(False)
    peft = attempted(lambda: adapted_by_peft(floor, r))
    eager = attempted(lambda: EagerExperts(floor.experts, floor.index, floor.weights, r))
    models = {"floor": floor, "ours": adapted_experts(floor, r), "PEFT": peft, "eager": eager}
    pairs = bench.pairs(tokens, hidden, sets=8)
    steps = {name: layer_step(model, pairs) for name, model in models.items()}
    steps, failures = working(steps)
    memory = {name: bench.memory(models[name], models[name], pairs[0]) for name in steps}
    timings = bench.timed(steps, 5)
    passes = [
        *adapter_passes(tokens * top, hidden, 2 * width, r, factors=count),
        *adapter_passes(tokens * top, width, hidden, r, factors=count),
    ]
    workload = (
        f"{count} experts {hidden}x{width}, top {top}, {tokens:,} tokens, r={r}, bf16, "
        "grouped_mm, forward + backward"
    )
    notes = [shown(memory), *failures]
    extra = bench.ceilings.seconds(passes)
    yield against("experts", workload, timings, 1.25, extra=extra, notes=notes)


def rows_with_adapters(bench: Bench) -> Iterator[Result]:
    """64 adapters in one batch, one for each of its rows; beside one adapter for all of them."""
    d, tokens, count, r = bench.pick((4096, 512, 64, 16), (32, 4, 3, 16))
    names = [f"a{i}" for i in range(count)]
    models = _with_rows(nn.Linear(d, d, device=bench.device, dtype=BF16), names, r)
    for length in (tokens, 1):
        pairs = bench.pairs(count, length, d, sets=2 if length > 1 else 8)
        shape = f"{count} adapters x {length} tokens, {d}x{d} bf16, r={r}"
        # Each row has its own A and B, of which one adapter reads one only.
        passes = adapter_passes(0, d, d, r, factors=count - 1, backward=False)
        calls = {name: forward_of(model, pairs) for name, model in models.items()}
        calls["PEFT"] = forward_of(partial(models["PEFT"], adapter_names=names), pairs)
        with per_row(models["ours"], names), torch.no_grad():
            calls, failures = working(calls)
            timings = bench.timed(calls, 3 if length > 1 else 50)
        yield against(
            "per-row", f"{shape}, forward", timings, 1.25, floor="one adapter",
            extra=bench.ceilings.seconds(passes), notes=failures,
        )  # fmt: skip
        if length == 1:
            return
        passes = adapter_passes(0, d, d, r, factors=count - 1)
        steps = {n: layer_step(m, pairs) for n, m in models.items() if n != "PEFT"}
        with per_row(models["ours"], names):
            timings = bench.timed(steps, 3)
        yield against(
            "per-row", f"{shape}, forward + backward", timings, 1.25, floor="one adapter",
            extra=bench.ceilings.seconds(passes),
            notes=["PEFT and the plain composition cannot train several adapters in a batch"],
        )  # fmt: skip


def _with_rows(layer: nn.Linear, names: list[str], r: int) -> dict[str, nn.Module]:
    """The layer alone, with one adapter, and with all of them: ours and PEFT's."""
    floor = nn.Sequential(layer).requires_grad_(False)
    one, ours = copy.deepcopy(floor), copy.deepcopy(floor)
    inject(one, "0", r=r, dtype="base")
    for name in names:
        inject(ours, "0", r=r, dtype="base", adapter=name)
    use(ours, *names)
    models = {"floor": floor, "one adapter": randomize(one), "ours": randomize(ours)}
    return models | {"PEFT": attempted(lambda: _peft_with(floor, names, r))}


def _peft_with(model: nn.Module, names: list[str], r: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    return randomize(theirs.to(BF16)).eval()
