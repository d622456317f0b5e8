"""What injecting, stripping, planning and importing cost."""

import subprocess
import sys

import torch
from torch import nn

from benchmarks.harness import Result, median, row, seconds
from lora_inject import inject, plan, strip


def _timing(name: str, workload: str, timings: list[float], limit: int) -> Result:
    taken = median(timings)
    return Result(name, workload, f"{taken:.3f} s", f"< {limit} s", taken < limit)


@row("small-layers")
def small_layers(rounds: int) -> list[Result]:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4000)))
    injected, stripped = [], []
    for _ in range(rounds):
        injected.append(seconds(lambda: inject(model, nn.Linear, r=8)))
        stripped.append(seconds(lambda: strip(model)))
    workload = "{} 4,000 Linear(16, 16), r=8"
    return [
        _timing("inject", workload.format("inject into"), injected, limit=1),
        _timing("strip", workload.format("strip"), stripped, limit=1),
    ]


@row("llama-405b")
def llama_405b(rounds: int) -> list[Result]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    planned, injected = [], []
    for _ in range(rounds):
        planned.append(seconds(lambda: plan(model, r=16)))
        injected.append(seconds(lambda: inject(model, r=16)))
        strip(model)
    workload = "{} a Llama of 405 billion parameters on meta, 882 layers"
    return [
        _timing("plan", workload.format("plan for"), planned, limit=2),
        _timing("inject", workload.format("inject into"), injected, limit=2),
    ]


@row("import")
def import_time(rounds: int) -> list[Result]:
    timed = (
        "import time, torch; started = time.perf_counter(); import lora_inject; "
        "print(time.perf_counter() - started)"
    )

    def fresh() -> float:
        done = subprocess.run([sys.executable, "-c", timed], capture_output=True, check=True)
        return float(done.stdout)

    extra = median([fresh() for _ in range(rounds)])
    value = f"+ {extra:.3f} s"
    return [Result("import", "`import lora_inject` after torch", value, "+ 0.1 s", extra < 0.1)]
