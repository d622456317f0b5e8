"""What injecting, stripping, planning and importing cost."""

import copy
import os
import subprocess
import sys
import tempfile
from statistics import median

import torch
from torch import nn

from benchmarks.harness import Result, row, seconds
from benchmarks.peers import PROJECTIONS, llama_of_48_layers
from lora_inject import inject, plan, strip, use


def _timing(name: str, workload: str, timings: list[float], limit: int) -> Result:
    taken = median(timings)
    return Result(name, workload, f"{taken:.3f} s", f"< {limit} s", taken < limit)


@row("inject")
def beside_peft(rounds: int) -> list[Result]:
    import peft

    config = peft.LoraConfig(r=8, target_modules=PROJECTIONS)
    model = llama_of_48_layers()
    faster = []
    for _ in range(rounds):
        other = copy.deepcopy(model)
        ours = seconds(lambda: inject(model, PROJECTIONS, r=8))
        theirs = seconds(lambda other=other: peft.get_peft_model(other, config))
        faster.append(theirs / ours)
        strip(model)
    value = f"{median(faster):.1f}x faster, {1e3 * ours:.0f} ms"
    workload = "inject into 336 layers of a Llama, beside PEFT"
    met = median(faster) >= 12
    return [Result("inject", workload, value, ">= 12x faster", met, profile=_of_inject())]


def _of_inject() -> str:
    """How long the parts of injecting take that cannot be left out."""
    model = llama_of_48_layers()
    planned = seconds(lambda: plan(model, PROJECTIONS, r=8))
    whole = seconds(lambda: inject(model, PROJECTIONS, r=8))
    pairs = [module.lora_A for module in model.modules() if hasattr(module, "lora_A")]
    draws = seconds(lambda: [nn.init.kaiming_uniform_(torch.empty_like(A)) for A in pairs])
    return (
        f"of {1e3 * whole:.0f} ms in a run of its own, checking all targets before anything is "
        f"changed takes {1e3 * planned:.0f} ms and drawing the values of A {1e3 * draws:.0f} ms."
    )


@row("use")
def switching(rounds: int) -> list[Result]:
    model = llama_of_48_layers()
    inject(model, PROJECTIONS, r=8, adapter="fr")
    use(model)
    inject(model, PROJECTIONS, r=8, adapter="de")
    choices = (("fr",), ("de",), ())
    taken = [seconds(lambda c=c: use(model, *c)) for _ in range(3 * rounds) for c in choices]
    value = f"{1e3 * median(taken):.1f} ms"
    workload = "choose one of two adapters, or none, on 336 layers of a Llama"
    return [Result("use", workload, value, "<= 4 ms", median(taken) <= 4e-3)]


@row("small-layers")
def small_layers(rounds: int) -> list[Result]:
    def timed(count: int, rounds: int) -> tuple[list[float], list[float]]:
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
        injected, stripped = [], []
        for _ in range(rounds):
            injected.append(seconds(lambda: inject(model, nn.Linear, r=8)))
            stripped.append(seconds(lambda: strip(model)))
        return injected, stripped

    injected, stripped = timed(4000, rounds)
    many, _ = timed(18_432, max(3, rounds // 5))
    growth = median(many) / median(injected) / (18_432 / 4000)
    workload = "{} 4,000 Linear(16, 16), r=8"
    return [
        _timing("inject", workload.format("inject into"), injected, limit=1),
        _timing("strip", workload.format("strip"), stripped, limit=1),
        Result("inject", "inject into 18,432 Linear(16, 16), r=8",
               f"{median(many):.2f} s, {growth:.2f}x the time per layer of 4,000",
               "linear: <= 1.2x per layer", growth <= 1.2),
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
        _timing("plan", workload.format("plan for"), planned, limit=2),
        _timing("inject", workload.format("inject into"), injected, limit=2),
    ]


_NEEDED = "from lora_inject import inject"


@row("import")
def import_time(rounds: int) -> list[Result]:
    # With compiled bytecode, as pip leaves it: the first import of each writes it.
    with tempfile.TemporaryDirectory() as folder:
        extra = median(_import_times(_NEEDED, rounds, folder))
        alone = median(_import_times(_NEEDED, rounds, folder, "gc.disable()"))
        bare = median(_import_times("import lora_inject", rounds, folder))
        peft = median(_import_times("import peft", 3, folder))
    value = f"+ {extra:.3f} s (PEFT + {peft:.1f} s)"
    profile = (
        f"with the garbage collector off it takes {alone:.3f} s, and `import lora_inject` alone "
        f"{bare:.3f} s, since names are imported when they are first asked for. After torch's own "
        "import a full collection of all its objects is due: whoever is imported next pays for it."
    )
    met = extra < 0.1
    return [Result("import", f"`{_NEEDED}` after torch", value, "+ 0.1 s", met, {}, profile)]


def _import_times(statement: str, rounds: int, folder: str, first: str = "pass") -> list[float]:
    """What an import takes after torch, in processes of their own."""
    code = (
        f"import gc, time, torch; {first}; started = time.perf_counter(); {statement}; "
        "print(time.perf_counter() - started)"
    )
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env = {**kept, "PYTHONPYCACHEPREFIX": folder}
    times = []
    for _ in range(rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env=env
        )
        times.append(float(done.stdout))
    return times[1:]
