"""What an adapted layer costs in time, beside the frozen one, PEFT and the plain composition."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import (
    LIMIT,
    PRODUCTS,
    Result,
    Timings,
    compared,
    interleaved,
    limit_of,
    row,
)
from benchmarks.limits import model_parts, parts, products
from benchmarks.peers import PROJECTIONS, eager, randomize, small_llama, with_peft
from lora_inject import inject
from lora_inject.arithmetic import linear

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One layer of d x d features and one batch; a Llama reads as many tokens as it has rows."""

    rows: int
    d: int
    r: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    adapters: torch.dtype = torch.float32


def adapted(base: nn.Module, names: list[str], case: Case) -> dict[str, nn.Module]:
    """The frozen model, and it with everybody's adapters."""
    floor = (base if names else nn.Sequential(base)).requires_grad_(False)
    names, model = names or ["0"], copy.deepcopy(floor)
    inject(model, names, r=case.r, dropout=case.dropout, dtype=case.adapters)
    wide = case.adapters == torch.float32
    peft = with_peft(floor, names, case.r, case.dropout, autocast_adapter_dtype=wide)
    models = {"floor": floor, "ours": model, "PEFT": peft}
    if case.adapters == case.dtype:
        models["eager"] = eager(floor, names, case.r, case.dropout)
    return {name: randomize(m) for name, m in models.items()}


def measured(case: Case, rounds: int, repeats: int) -> Timings:
    """Forward and backward through one layer, and where that is known, the least it can take."""
    torch.manual_seed(0)
    models = adapted(nn.Linear(case.d, case.d).to(case.dtype), [], case)
    x = torch.randn(case.rows, case.d, dtype=case.dtype, requires_grad=True)
    g = torch.randn(case.rows, case.d, dtype=case.dtype)
    steps = {name: layer_step(model, [(x, g)]) for name, model in models.items()}
    if case.dtype == torch.float32:
        steps[LIMIT] = parts(_only_layer(models["ours"]), cycle([(x, g)]), case.dropout)
        steps[PRODUCTS] = products(_only_layer(models["floor"]), x, g)
    return interleaved(steps, rounds, repeats)


def layer_step(
    model: nn.Module,
    pairs: Iterable[tuple[Tensor, Tensor]],
    call: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Forward and backward, each time with the next input and gradient of the output.

    Args:
        model: whose gradients are dropped before each step.
        pairs: inputs that require gradients, and gradients of outputs.
        call: how to run the model; by calling it if None.
    """
    parameters, turns = list(model.parameters()), cycle(pairs)
    call = model if call is None else call

    def step() -> None:
        x, g = next(turns)
        for leaf in (x, *parameters):
            leaf.grad = None
        call(x).backward(g)

    return step


def forward_of(call: Callable[[Tensor], object], pairs: Iterable[tuple[Tensor, Tensor]]) -> Step:
    """A call with the next input."""
    turns = cycle(pairs)
    return lambda: call(next(turns)[0])


@row("layer")
def layer(rounds: int) -> list[Result]:
    without = measured(Case(512, 768, 8), 2 * rounds, 4)
    dropped = measured(Case(512, 768, 8, dropout=0.1), 2 * rounds, 4)
    return [
        _layer_result("layer 512x768 r=8 fp32, p=0, forward + backward", without, 1.2),
        _layer_result("the same, p=0.1", dropped, 1.5),
    ]


def _layer_result(workload: str, timings: Timings, most: float) -> Result:
    ours, least = timings.ratio("ours", "floor"), timings.ratio(LIMIT, "floor")
    over = timings.ratio("ours", LIMIT)
    # Where the limit itself is over the goal, the limit is the goal.
    met = over <= 1.05 and (ours <= most or least > most)
    value = f"{compared(timings)}; {over:.2f}x limit"
    goal = f"<= {most:.2f}x floor and <= 1.05x limit"
    profile = (
        f"{_profile(timings)} The limit has no calls and no autograd; with its own, the frozen "
        f"layer takes {timings.ratio('floor', PRODUCTS):.2f}x of its two products alone."
    )
    times, limit = timings.over("floor"), limit_of(timings)
    return Result("layer", workload, value, goal, met, times, profile, limit)


def _profile(timings: Timings) -> str:
    """The rest of the time is the floor's own, which nobody can make faster than PEFT's."""
    floor, ours = timings.seconds("floor"), timings.seconds("ours")
    peft = timings.seconds("PEFT")
    return (
        f"the frozen layer takes {1e3 * floor:.2f} ms of our {1e3 * ours:.2f} ms and of PEFT's "
        f"{1e3 * peft:.2f} ms, so that what adapters cost is {(peft - floor) / (ours - floor):.1f} "
        "times less here."
    )


def llama_step(model: nn.Module, tokens: int = 512) -> Step:
    """Forward and backward, with gradients down to the embedding, as in the frozen floor."""
    loss, parameters = llama_loss(model, tokens), list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()

    return step


def llama_loss(model: nn.Module, tokens: int = 512) -> Callable[[], Tensor]:
    """Forward, of embeddings that need a gradient of their own each time."""
    ids = torch.randint(1000, (2, tokens // 2))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]

    def loss() -> Tensor:
        embedded.grad = None
        found: Tensor = model(inputs_embeds=embedded, labels=ids).loss
        return found

    return loss


@row("llama")
def llama(rounds: int) -> list[Result]:
    timings = llama_timings(Case(512, 512, 8, dropout=0.05), rounds)
    ours, least = timings.ratio("ours", "PEFT"), timings.ratio(LIMIT, "PEFT")
    value = f"{ours:.2f}x PEFT; {compared(timings)}"
    workload = "Llama-small step (4 blocks of 512, 512 tokens), 7 linears, r=8, p=0.05"
    limit = f"{least:.2f}x PEFT (the frozen step, and the adapters' parts after it)"
    return [
        Result("llama", workload, value, "<= 0.74x PEFT, or 1.05x limit",
               ours <= max(0.74, 1.05 * least),
               timings.over("floor"), _profile(timings), limit)
    ]  # fmt: skip


def llama_timings(case: Case, rounds: int) -> Timings:
    """Forward and backward through the Llama, with as many tokens as the case has rows."""
    models = adapted(small_llama(case.dtype), PROJECTIONS, case)
    steps = {name: llama_step(model.train(), case.rows) for name, model in models.items()}
    if case.dtype == torch.float32:
        beyond = model_parts(models["ours"], case.rows, case.dropout)
        steps[LIMIT] = lambda: (steps["floor"](), beyond())
    return interleaved(steps, rounds)


@row("16-bit")
def sixteen_bits(rounds: int) -> list[Result]:
    results = []
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in linear._SLOW:
            found, where = sixteen_bit_ratios(str(dtype)[6:], rounds), "this CPU"
        else:
            found, where = _on_an_older_cpu(str(dtype)[6:], rounds), "oneDNN held to AVX2"
        for what, (goal, times) in found.items():
            value = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in times.items())
            workload = f"{what} in {dtype} without such instructions ({where})"
            met = times["ours"] <= goal
            results.append(Result("16-bit", workload, f"{value} floor", f"<= {goal}x floor", met))
    return results


def sixteen_bit_ratios(dtype: str, rounds: int) -> dict[str, tuple[float, dict[str, float]]]:
    """For the layer and the Llama step: the goal, and the times over the frozen floor."""
    case = Case(128, 768, 8, dtype=getattr(torch, dtype))
    return {
        "layer 128x768 r=8": (0.35, measured(case, rounds, 1).over("floor")),
        "Llama-small step, 128 tokens": (0.55, llama_timings(case, rounds).over("floor")),
    }


def _on_an_older_cpu(dtype: str, rounds: int) -> dict[str, tuple[float, dict[str, float]]]:
    """The same in a process whose matrix library uses no newer instructions than AVX2."""
    code = (
        "import json, torch; from benchmarks import arithmetic as rows; "
        f"rows.linear._SLOW = frozenset([torch.{dtype}]); "
        f"print(json.dumps(rows.sixteen_bit_ratios({dtype!r}, {rounds})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, check=True,
    )  # fmt: skip
    found: dict[str, tuple[float, dict[str, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@row("decode")
def one_row(rounds: int) -> list[Result]:
    results = []
    for d, goal in ((64, 2.0), (768, 1.5)):
        models = adapted(nn.Linear(d, d), [], Case(1, d, 8))
        x = torch.randn(1, d)
        with torch.no_grad():
            # The layers themselves: what calls them would cost all of them the same.
            layers = {name: _only_layer(model.eval()) for name, model in models.items()}
            calls: dict[str, Step] = {name: partial(m, x) for name, m in layers.items()}
            calls[LIMIT] = _three_operations(layers["ours"], x)
            timings = interleaved(calls, 4 * rounds, 200)
        ours, limit = timings.ratio("ours", "floor"), limit_of(timings)
        profile = (
            f"the three operations alone, in no layer, take {limit}; the rest is the call and the "
            "choice of the way."
        )
        workload = f"one row through a layer of {d}x{d}, r=8, no gradients, unmerged"
        times, value = timings.over("floor"), compared(timings)
        results.append(
            Result("decode", workload, value, f"<= {goal}x floor", ours <= goal, times, profile,
                   limit)
        )  # fmt: skip
    return results


def _three_operations(layer: Any, x: Tensor) -> Step:
    W, b, A, B = layer.weight, layer.bias, layer.lora_A, layer.lora_B
    return lambda: F.linear(x, W, b).addmm_(F.linear(x, A), B.mT)


def _only_layer(model: Any) -> nn.Module:
    only: nn.Module = getattr(getattr(model, "base_model", model), "model", model)[0]
    return only
