"""What injecting, stripping, planning and importing cost."""

import subprocess
import sys

import torch
from torch import nn

from benchmarks.harness import Result, median, row, seconds
from lora_inject import inject, plan, strip


@row("small-layers")
def small_layers(rounds: int) -> list[Result]:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4000)))
    injected, stripped = [], []
    for _ in range(rounds):
        injected.append(seconds(lambda: inject(model, nn.Linear, r=8)))
        stripped.append(seconds(lambda: strip(model)))
    workload = "{} 4,000 Linear(16, 16), r=8"
    return [
        Result("inject", workload.format("inject into"), f"{median(injected):.2f} s", "< 1 s",
               median(injected) < 1),
        Result("strip", workload.format("strip"), f"{median(stripped):.2f} s", "< 1 s",
               median(stripped) < 1),
    ]  # fmt: skip


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
        Result("plan", workload.format("plan for"), f"{median(planned):.3f} s", "< 2 s",
               median(planned) < 2),
        Result("inject", workload.format("inject into"), f"{median(injected):.3f} s", "< 2 s",
               median(injected) < 2),
    ]  # fmt: skip


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
