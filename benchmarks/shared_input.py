"""Whether layers that read one x (q, k, v; gate, up) should make one product of their A.

As they would be built: apart, each adds to the gradient of x that its own layer has made; as one,
the gradient of x is made anew and then added to the others, as autograd does it. One code for the
CPU (``python -m benchmarks shared-input``) and a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arithmetic import forward_of, layer_step
from benchmarks.harness import Action, Result, Timings, interleaved, row
from benchmarks.peers import PROJECTIONS, LlamaBlock, randomize
from lora_inject import inject

Pairs = list[tuple[Tensor, Tensor]]
WORTH = 0.02  # of a block's time


@row("shared-input")
def on_the_cpu(rounds: int) -> list[Result]:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaBlock(config, 512, "cpu", torch.float32)
    x = torch.randn(1, 512, 512, requires_grad=True)
    pairs = [(x, torch.randn(1, 512, 512))]
    return list(shared_input(block, pairs, 8, lambda actions: interleaved(actions, rounds, 2)))


def shared_input(
    block: LlamaBlock, pairs: Pairs, r: int, timed: Callable[[Mapping[str, Action]], Timings]
) -> Iterator[Result]:
    """What one product saves of the time of an adapted block, forward, and with its backward pass.

    Args:
        block: a block without adapters; it gets some.
        pairs: its inputs, and gradients of its outputs.
        r: the rank.
        timed: how to time actions.
    """
    inject(block.requires_grad_(False), PROJECTIONS, r=r, dtype="base")
    randomize(block)
    x = pairs[0][0]
    for backward in (False, True):
        actions = {"block": layer_step(block, pairs) if backward else forward_of(block, pairs)}
        for count in (3, 2):
            actions |= _downs([x[0].detach() for x, _ in pairs], count, r, backward)
        timings = timed(actions)
        ms = {name: 1e3 * timings.seconds(name) for name in actions}
        saved = sum(ms[f"{n} apart"] - ms[f"{n} as one"] for n in (3, 2)) / ms["block"]
        what = "forward + backward" if backward else "forward"
        yield Result(
            "shared-input",
            f"A x of q, k, v and of gate, up: {x.shape[1]:,}x{x.shape[2]}, r={r}, "
            f"{str(x.dtype)[6:]}, {what}",
            f"as one saves {100 * saved:.1f} % of the adapted block's {ms['block']:.3g} ms; q, k, "
            f"v: apart {ms['3 apart']:.3g} ms, as one {ms['3 as one']:.3g} ms; gate, up: "
            f"{ms['2 apart']:.3g} ms, {ms['2 as one']:.3g} ms",
            f"worth building from {100 * WORTH:.0f} %", saved >= WORTH,
        )  # fmt: skip


def _downs(inputs: list[Tensor], count: int, r: int, backward: bool) -> dict[str, Action]:
    """The products with A of so many layers that read one x, apart and as one."""
    turns = cycle(inputs)
    tokens, d = inputs[0].shape
    empty = inputs[0].new_empty
    factors = [empty(r, d).normal_(std=d**-0.5) for _ in range(count)]
    gradients = [empty(tokens, r).normal_() for _ in range(count)]  # of h
    sums = [empty(tokens, d).normal_() for _ in range(count)]  # the layers' own gradients of x

    @torch.no_grad()
    def apart() -> None:
        x = next(turns)
        for A, t, dx in zip(factors, gradients, sums, strict=True):
            F.linear(x, A)
            if backward:
                t.t() @ x
                dx.addmm_(t, A)

    @torch.no_grad()
    def as_one() -> None:
        x, A = next(turns), torch.cat(factors)
        F.linear(x, A)
        if backward:
            t = torch.cat(gradients, 1)
            t.t() @ x
            sums[0].add_(t @ A)

    return {f"{count} apart": apart, f"{count} as one": as_one}
