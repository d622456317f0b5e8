"""Merging beside PEFT, and what a merged or disabled layer costs."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness import Result, interleaved, row
from lora_inject import disabled, inject, merge, unmerge


@row("merge")
def merge_and_unmerge(rounds: int) -> list[Result]:
    import peft

    base = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    )
    ours = copy.deepcopy(base)
    inject(ours, "0", r=16)
    nn.init.normal_(ours[0].lora_B, std=0.02)

    def their_cycle() -> None:
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    def our_cycle() -> None:
        merge(ours)
        unmerge(ours)

    our_time, their_time = interleaved([our_cycle, their_cycle], rounds)
    altered = [
        100 * (now != base[0].weight).float().mean().item()
        for now in (ours[0].weight, theirs.base_model.model[0].base_layer.weight)
    ]
    faster = their_time / our_time
    value = f"{faster:.1f}x faster, {altered[0]:.1f} % of weights altered (PEFT {altered[1]:.1f} %)"
    goal = ">= 10x faster, 0 altered"
    workload = "merge and unmerge 1024x1024, r=16, fp32, beside PEFT"
    return [Result("merge", workload, value, goal, faster >= 10 and altered[0] == 0)]


@row("asleep")
def merged_or_disabled(rounds: int) -> list[Result]:
    plain = nn.Linear(768, 768).requires_grad_(False)
    merged_layer, sleeping = (nn.Sequential(copy.deepcopy(plain)) for _ in range(2))
    for model in (merged_layer, sleeping):
        inject(model, "0", r=8)
    merge(merged_layer)
    x = torch.randn(16, 768)

    def calls(layer: nn.Module) -> Callable[[], object]:
        return lambda: [layer(x) for _ in range(200)]

    with torch.no_grad(), disabled(sleeping):
        layers = [plain, merged_layer[0], sleeping[0]]
        floor, merged_time, disabled_time = interleaved([calls(m) for m in layers], 20 * rounds)
    return [
        Result("asleep", f"a {name} layer beside nn.Linear, 16x768", f"{t / floor:.2f}x",
               "<= 1.02x", t / floor <= 1.02)
        for name, t in (("merged", merged_time), ("disabled", disabled_time))
    ]  # fmt: skip
