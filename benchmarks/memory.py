"""What adapters keep for the backward pass, in exact bytes, and the peak memory of injecting."""

import subprocess
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arithmetic import Case, Step, adapted, llama_loss
from benchmarks.harness import Result, row
from benchmarks.peers import PROJECTIONS, small_llama


def bytes_kept(run: Step) -> int:
    """The bytes that torch's CPU allocator holds more once a run's result is there.

    Hooks on what is saved would be another way to count; but they switch some savings off.
    """
    run()  # what is made at the first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = run()
    del held
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@row("saved")
def saved(rounds: int) -> list[Result]:
    bf16 = torch.bfloat16
    cases = {
        "p=0.05": (Case(512, 512, 8, dropout=0.05), 0.30),
        "bf16 base + fp32 adapters": (Case(512, 512, 8, dtype=bf16), 0.28),
        "p=0": (Case(512, 512, 8), 0.80),
    }
    results = []
    for name, (case, goal) in cases.items():
        models = adapted(small_llama(case.dtype), PROJECTIONS, case)
        kept = {name: bytes_kept(llama_loss(m.train())) for name, m in models.items()}
        ours, peft = (kept[key] - kept["floor"] for key in ("ours", "PEFT"))
        workload = f"bytes kept for backward over the frozen Llama-small: {name}"
        value = f"{ours / peft:.2f}x of PEFT ({ours / 2**20:.1f} MiB, PEFT {peft / 2**20:.1f} MiB)"
        met = ours <= goal * peft
        results.append(Result("saved", workload, value, f"<= {goal:.2f}x of PEFT", met))
    return results


_PEAK = """
import torch
from torch import nn
from lora_inject import inject

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

inject(nn.Sequential(nn.Linear(8, 8)), "0", r=2)  # what is imported at the first use
model = nn.Sequential(nn.Linear(8192, 8192, bias=False))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
inject(model, "0", r=16)
adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
print(peak() - before - adapter)
"""


@row("peak")
def peak_of_inject(rounds: int) -> list[Result]:
    if not sys.platform.startswith("linux"):
        return [Result("peak", "peak memory of inject", "needs Linux", "< 2 MB", None)]
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, check=True)
    extra = float(done.stdout)
    workload = "peak memory of inject beyond the adapter: one Linear(8192, 8192), r=16"
    return [Result("peak", workload, f"{extra:.2f} MB", "< 2 MB", extra < 2)]
