"""Rows for a GPU: a block of Llama-8B in training, decoding one token, and compiled."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.arithmetic import Case, adapted, forward_of, layer_step
from benchmarks.bench import BF16, Bench, against, shown, working
from benchmarks.harness import Result
from benchmarks.limits import Pass, adapter_passes
from benchmarks.peers import PROJECTIONS, LlamaBlock
from benchmarks.shared_input import shared_input
from lora_inject import disabled, merge

R = 16
MODES = ("merged", "disabled")
Call = Callable[[Tensor], Tensor]


def llama_8b(bench: Bench, layers: int = 32) -> Any:
    """The config of a Llama of 8 billion parameters; of a tiny one in a quick run."""
    from transformers import LlamaConfig

    hidden, inter, heads, vocab = bench.pick((4096, 14336, 32, 128256), (32, 64, 4, 64))
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inter, num_attention_heads=heads,
        num_key_value_heads=heads // 4 if not bench.quick else 2, vocab_size=vocab,
        num_hidden_layers=bench.pick(layers, 2), max_position_embeddings=8192,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def llama_block(bench: Bench, tokens: int) -> LlamaBlock:
    """A block with random weights, for inputs of so many tokens."""
    torch.manual_seed(0)
    return LlamaBlock(llama_8b(bench), tokens, bench.device, BF16)


def block_passes(model: nn.Module, tokens: int, backward: bool = True) -> list[Pass]:
    """What adapters add to all projections of a block."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [
        found
        for m in linears
        for found in adapter_passes(tokens, m.in_features, m.out_features, R, backward=backward)
    ]


def block(bench: Bench, checkpointing: bool) -> Iterator[Result]:
    """Forward and backward through the block: time, what is kept, and the peak."""
    tokens = bench.pick(4096, 8)
    floor = llama_block(bench, tokens)
    passes = block_passes(floor, tokens)
    if checkpointing:
        passes += block_passes(floor, tokens, backward=False)
    models = adapted(floor, PROJECTIONS, Case(tokens, 0, R, dtype=BF16, adapters=BF16))
    pairs = bench.pairs(1, tokens, floor.hidden_size)

    def called(model: nn.Module) -> Call:
        again = partial(checkpoint, model, use_reentrant=False)
        return again if checkpointing else model

    steps = {
        name: layer_step(model.train(), pairs, called(model)) for name, model in models.items()
    }
    steps, failures = working(steps)
    memory = {name: bench.memory(models[name], called(models[name]), pairs[0]) for name in steps}
    timings = bench.timed(steps, 3)
    ours, peft = memory["ours"], memory.get("PEFT")
    met = timings.ratio("ours", "PEFT") <= 1 and (not ours or not peft or ours.kept <= peft.kept)
    how = "checkpointed" if checkpointing else "not checkpointed"
    workload = f"block of Llama-8B, bf16, {tokens:,} tokens, r={R} on all seven, {how}"
    extra = bench.ceilings.seconds(passes)
    found = against("block", workload, timings, 0, extra=extra, notes=[shown(memory), *failures])
    yield replace(found, goal="<= PEFT's time and bytes", met=met)


def shared(bench: Bench) -> Iterator[Result]:
    """Whether layers that read one x should make one product of their A."""
    tokens = bench.pick(4096, 8)
    block = llama_block(bench, tokens)
    pairs = bench.pairs(1, tokens, block.hidden_size)
    return shared_input(block, pairs, R, lambda actions: bench.timed(actions, 10))


def decode(bench: Bench, graphs: bool) -> Iterator[Result]:
    """One token through the block, without gradients: unmerged, merged, disabled."""
    floor = llama_block(bench, 1)
    passes = block_passes(floor, 1, backward=False)
    models = adapted(floor, PROJECTIONS, Case(1, 0, R, dtype=BF16, adapters=BF16))
    for name in ("ours", "PEFT"):
        models |= {f"{name} {mode}": copy.deepcopy(models[name]) for mode in MODES}
    merge(models["ours merged"])
    models["PEFT merged"].merge_adapter()  # type: ignore[operator]
    pairs = bench.pairs(1, 1, floor.hidden_size)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(disabled(models["ours disabled"]))
        stack.enter_context(models["PEFT disabled"].disable_adapter())  # type: ignore[operator]
        calls = {name: forward_of(model.eval(), pairs) for name, model in models.items()}
        calls, failures = working(bench.graphed(calls) if graphs else calls)
        timings = bench.timed(calls, 50, rounds=21)
    ratios = [timings.ratio(f"ours {mode}", "floor") for mode in MODES]
    how = "in CUDA graphs" if graphs else "eager"
    workload = f"block of Llama-8B, bf16, one token, no gradients, r={R} on all seven, {how}"
    extra = bench.ceilings.seconds(passes)
    found = against("decode", workload, timings, 0, extra=extra, notes=failures)
    goal = "merged and disabled 1.00x floor (to 2 %)"
    yield replace(found, goal=goal, met=max(ratios) <= 1.02)


def compiled(bench: Bench, whole: bool) -> Iterator[Result]:
    """``torch.compile(fullgraph=True)``, which raises at a graph break, forward and backward."""
    tokens, d = bench.pick((4096, 4096), (8, 32))
    layer = nn.Linear(d, d, device=bench.device, dtype=BF16)
    floor, names = (llama_block(bench, tokens), PROJECTIONS) if whole else (layer, [])
    models = adapted(floor, names, Case(tokens, d, R, dtype=BF16, adapters=BF16))
    shape = (1, tokens, models["floor"].hidden_size) if whole else (tokens, d)
    pairs = bench.pairs(*shape)  # type: ignore[arg-type]
    passes = block_passes(models["floor"], tokens)
    torch.compiler.reset()
    backend = bench.pick("inductor", "aot_eager")
    calls = {
        name: torch.compile(models[name], fullgraph=True, dynamic=False, backend=backend)
        for name in ("floor", "ours")
    }
    steps = {name: layer_step(models[name], pairs, call) for name, call in calls.items()}
    steps["ours not compiled"] = layer_step(models["ours"], pairs)
    timings = bench.timed(steps, 5)
    torch.compiler.reset()
    what = "block of Llama-8B" if whole else f"layer {d}x{d}"
    workload = f"compiled {what}, bf16, {tokens:,} tokens, r={R}, forward + backward"
    extra = bench.ceilings.seconds(passes)
    eager = timings.ratio("ours", "ours not compiled")
    note = f"0 graph breaks; {eager:.3f}x of ours not compiled"
    found = against("compile", workload, timings, 0, extra=extra, notes=[note])
    goal = "0 graph breaks, <= 1.02x of ours not compiled"
    yield replace(found, goal=goal, met=eager <= 1.02)
