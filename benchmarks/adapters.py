"""Several adapters: switching, loading from disk, a different one for each row of a batch."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Result, interleaved, row, seconds
from lora_inject import inject, load, per_row, remove, save, use

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_of_48_layers() -> Any:
    """A Llama with 336 linear layers, small ones, since the control plane is what is measured."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=48, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@row("switch")
def switching(rounds: int) -> list[Result]:
    import peft

    ours = llama_of_48_layers()
    config = peft.LoraConfig(r=8, target_modules=PROJECTIONS)
    theirs: Any = peft.get_peft_model(copy.deepcopy(ours), config, adapter_name="a")
    theirs.add_adapter("b", config)
    for name in ("a", "b"):
        inject(ours, PROJECTIONS, r=8, adapter=name)

    def our_switches() -> None:
        use(ours, "a")
        use(ours, "b")

    def their_switches() -> None:
        theirs.set_adapter("a")
        theirs.set_adapter("b")

    our_time, their_time = interleaved([our_switches, their_switches], rounds)
    faster = their_time / our_time
    workload = "switch adapters on 336 layers, beside PEFT"
    value = f"{faster:.0f}x faster, {1000 * our_time / 2:.1f} ms"
    return [Result("switch", workload, value, ">= 20x faster", faster >= 20)]


@row("load")
def loading(rounds: int) -> list[Result]:
    import peft

    ours = llama_of_48_layers()
    config = peft.LoraConfig(r=8, target_modules=PROJECTIONS)
    theirs: Any = peft.get_peft_model(copy.deepcopy(ours), config, adapter_name="a")
    inject(ours, PROJECTIONS, r=8, adapter="a")
    new, filled, other = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        save(ours, folder)
        for _ in range(rounds):
            new.append(seconds(lambda: load(ours, folder, adapter="b")))
            filled.append(seconds(lambda: load(ours, folder, adapter="b")))
            remove(ours, "b")
            other.append(seconds(lambda: theirs.load_adapter(Path(folder), "b")))
            theirs.delete_adapter("b")
    times = [sorted(timings)[len(timings) // 2] for timings in (new, filled, other)]
    return [
        Result("load", f"load 672 tensors {what}, beside PEFT's load_adapter",
               f"{times[2] / taken:.1f}x faster, {1000 * taken:.0f} ms", ">= 15x faster",
               times[2] / taken >= 15)
        for what, taken in (("as a new adapter", times[0]), ("into an adapter", times[1]))
    ]  # fmt: skip


@row("per-row")
def sixteen_adapters(rounds: int) -> list[Result]:
    import peft

    plain = nn.Linear(768, 768).requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(plain))
    names = [f"a{i}" for i in range(16)]
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    wrapped = nn.Sequential(copy.deepcopy(plain))
    theirs: Any = peft.get_peft_model(wrapped, config, adapter_name="a0")
    for name in names:
        inject(ours, "0", r=8, adapter=name)
        if name not in theirs.peft_config:
            theirs.add_adapter(name, config)
    theirs.eval()
    x = torch.randn(16, 768)
    with torch.no_grad(), per_row(ours, names):
        floor, our_time, their_time = interleaved(
            [
                lambda: [plain(x) for _ in range(20)],
                lambda: [ours[0](x) for _ in range(20)],
                lambda: [theirs(x, adapter_names=names) for _ in range(20)],
            ],
            4 * rounds,
        )
    cost = our_time / floor
    workload = "16 adapters r=8 on 16 rows of 768x768, beside the plain layer"
    value = f"{cost:.2f}x (PEFT {their_time / floor:.1f}x)"
    return [Result("per-row", workload, value, "<= 2x", cost <= 2)]
