"""Merging beside PEFT, and what a merged or disabled layer costs."""

import copy

import torch
from torch import nn

from benchmarks.harness import LIMIT, Result, interleaved, row
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

    tiny = nn.Sequential(nn.Linear(8, 8, bias=False))
    inject(tiny, "0", r=2)

    def calls_alone() -> None:
        merge(tiny)
        unmerge(tiny)

    A, B, W = ours[0].lora_A.detach(), ours[0].lora_B.detach(), base[0].weight.detach()
    actions = {
        "ours": our_cycle,
        "PEFT": their_cycle,
        LIMIT: lambda: torch.addmm(W, B, A),
        "calls": calls_alone,
        "check": W.sum,
    }
    timings = interleaved(actions, 2 * rounds)
    altered = [
        100 * (now != base[0].weight).float().mean().item()
        for now in (ours[0].weight, theirs.base_model.model[0].base_layer.weight)
    ]
    faster, most = timings.ratio("PEFT", "ours"), timings.ratio("PEFT", LIMIT)
    ms = {name: f"{1e3 * timings.seconds(name):.2f} ms" for name in timings.rounds}
    profile = (
        f"of our {ms['ours']}, `W + B @ A` alone takes {ms[LIMIT]}, to see that the sum is finite "
        f"{ms['check']}, and the two calls {ms['calls']} for a layer of 8x8, just after PEFT's "
        f"cycle of {ms['PEFT']} has had the caches."
    )
    value = f"{faster:.1f}x faster, {altered[0]:.1f} % of weights altered (PEFT {altered[1]:.1f} %)"
    goal, limit = (
        ">= 3.5x faster or within 5 % of the limit, 0 altered",
        f"{most:.1f}x faster (`W + B @ A` alone)",
    )
    workload = "merge and unmerge 1024x1024, r=16, fp32, beside PEFT"
    met = faster >= min(3.5, most / 1.05) and altered[0] == 0
    return [Result("merge", workload, value, goal, met, profile=profile, limit=limit)]


@row("asleep")
def merged_or_disabled(rounds: int) -> list[Result]:
    plain = nn.Linear(768, 768).requires_grad_(False)
    merged_layer, sleeping = (nn.Sequential(copy.deepcopy(plain)) for _ in range(2))
    for model in (merged_layer, sleeping):
        inject(model, "0", r=8)
    merge(merged_layer)
    x = torch.randn(16, 768)

    with torch.no_grad(), disabled(sleeping):
        timings = interleaved(
            {
                "floor": lambda: plain(x),
                "merged": lambda: merged_layer[0](x),
                "disabled": lambda: sleeping[0](x),
            },
            20 * rounds,
            200,
        )
    return [
        Result("asleep", f"a {name} layer of 768x768, 16 rows", f"{ratio:.2f}x floor",
               "<= 1.02x floor", ratio <= 1.02)
        for name, ratio in timings.over("floor").items()
    ]  # fmt: skip
