"""Rows for a GPU: the verbs on a model of 8 billion parameters, training, capacity."""

import copy
import tempfile
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench import BF16, Bench, mib, ms
from benchmarks.gpu_blocks import llama_8b
from benchmarks.harness import Action, Result, seconds
from benchmarks.peers import PROJECTIONS, randomize, small_llama
from lora_inject import capacity, inject, load, lora_parameters, merge, save, strip, unmerge, use

R = 16
Times = dict[str, list[float]]


def verbs(bench: Bench) -> Iterator[Result]:
    """Inject, merge, unmerge, use and hot swap, beside PEFT on the same model."""
    rounds = bench.pick(3, 1)
    model = _filled(llama_8b(bench), bench.device)
    former = {n: p.clone() for n, p in model.named_parameters() if "layers.1." in n}
    ours = _our_verbs(model, rounds)
    whole = all(torch.equal(p, former[n]) for n, p in model.named_parameters() if n in former)
    weights = sum(m.weight.nbytes for m in model.modules() if type(m) is nn.Linear)
    limits = {"merge": f"{ms(2 * weights / bench.ceilings.bandwidth)} (W read, W' written)"}
    goals = {"inject": 12, "merge": 1, "unmerge": 1, "use": 1, "hot swap": 1}
    size = sum(p.numel() for p in model.parameters()) / 1e9
    what = f"Llama of {size:.1f} billion parameters, bf16, r={R} on all seven"
    try:
        theirs, failure = _their_verbs(model, rounds), ""
    except Exception as error:  # ours is measured, whatever PEFT makes of it
        theirs, failure = {}, f", {type(error).__name__}: {str(error)[:100]}"
    for verb, goal in goals.items():
        value, met = f"{ms(median(ours[verb]))} (PEFT cannot{failure})", None
        if verb in theirs:
            faster = median(theirs[verb]) / median(ours[verb])
            value = f"{ms(median(ours[verb]))}, PEFT {ms(median(theirs[verb]))}"
            value, met = f"{faster:.1f}x faster: {value}", faster >= goal
        wanted = f">= {goal}x faster than PEFT"
        yield Result("verbs", f"{verb}: {what}", value, wanted, met, limit=limits.get(verb, ""))
    value = "bit for bit" if whole else "altered"
    yield Result("verbs", "merge, unmerge and strip of the same", value, "bit for bit", whole)


def _filled(config: Any, device: str) -> Any:
    """A Llama in bfloat16 whose weights are drawn on the device itself."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(BF16)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.requires_grad_(False)


def _our_verbs(model: Any, rounds: int) -> Times:
    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):  # the first time, everything is imported and made
            _add(times, "inject", lambda: inject(model, PROJECTIONS, r=R, adapter="fr"))
            inject(model, PROJECTIONS, r=R, adapter="de")
            randomize(model)
            _add(times, "use", lambda: use(model, "fr"))
            save(model, folder, adapter="fr")
            _add(times, "hot swap", lambda: load(model, folder, adapter="fr"))
            _add(times, "merge", lambda: merge(model))
            _add(times, "unmerge", lambda: unmerge(model))
            strip(model)
    return {verb: taken[1:] for verb, taken in times.items()}


def _their_verbs(model: Any, rounds: int) -> Times:
    import peft
    from peft.utils.hotswap import hotswap_adapter

    config = peft.LoraConfig(r=R, target_modules=PROJECTIONS, init_lora_weights=False)
    times: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            made: list[Any] = []
            _add(times, "inject", lambda: made.append(  # noqa: B023
                peft.get_peft_model(model, config, adapter_name="fr")))  # fmt: skip
            theirs = made[0]
            theirs.add_adapter("de", config)
            _add(times, "use", partial(theirs.set_adapter, "de"))
            theirs.set_adapter("fr")
            theirs.save_pretrained(folder, selected_adapters=["fr"])
            swap = partial(hotswap_adapter, theirs, f"{folder}/fr", "fr", str(model.device))
            _add(times, "hot swap", swap)
            _add(times, "merge", theirs.merge_adapter)
            _add(times, "unmerge", theirs.unmerge_adapter)
            theirs.unload()
    return {verb: taken[1:] for verb, taken in times.items()}


def _add(times: Times, verb: str, action: Action) -> None:
    times.setdefault(verb, []).append(seconds(action))


def training(bench: Bench) -> Iterator[Result]:
    """The same small training run on the device and on the CPU."""
    steps, tokens = bench.pick((30, 64), (3, 4))
    here, model = _losses(_to_train(bench), bench.device, steps, tokens)
    there, _ = _losses(_to_train(bench), "cpu", steps, tokens)
    apart = max(abs(a - b) for a, b in zip(here, there, strict=True))
    plain, stripped = _to_train(bench).state_dict(), strip(model).cpu().state_dict()
    whole = all(torch.equal(value, stripped[name]) for name, value in plain.items())
    yield Result(
        "training", f"Llama-small, fp32 without TF32, {steps} steps of AdamW, r=8 on all linears",
        f"losses {here[0]:.4f} -> {here[-1]:.4f}, at most {apart:.1e} from the CPU's; stripped "
        f"{'bit for bit' if whole else 'with other weights'}",
        "<= 1e-3 from the CPU's, bit for bit", apart <= 1e-3 and whole,
    )  # fmt: skip


def _to_train(bench: Bench) -> Any:
    """The same model each time, in float32."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(llama_8b(bench)) if bench.quick else small_llama()


def _losses(model: Any, device: str, steps: int, tokens: int) -> tuple[list[float], nn.Module]:
    inject(model.to(device), PROJECTIONS, r=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, tokens), generator=generator).to(device)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-3)
    losses: list[Tensor] = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses], model


def predicted_memory(bench: Bench) -> Iterator[Result]:
    """The bytes of ``capacity`` beside what torch has allocated at most in a real training step."""
    batch, seq = bench.pick((4, 1024), (1, 8))
    config = copy.deepcopy(llama_8b(bench, layers=6))
    config.vocab_size = bench.pick(32000, 64)
    bench.collect()
    before = torch.cuda.memory_allocated() if bench.is_gpu else 0
    model, ids = _trainable(config, bench, batch, seq)
    needed = capacity(model, batch=batch, seq=seq)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    for i in range(3):
        if bench.is_gpu and i == 1:  # from here on there are gradients and states
            torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    shape = (
        f"Llama of {config.num_hidden_layers} blocks of {config.hidden_size}, {batch}x{seq} tokens"
    )
    workload = f"a training step with AdamW: {shape}, bf16, r={R}"
    goal = "prediction within 10 %"
    if not bench.is_gpu:
        value = f"predicted {mib(needed.total)}; nobody counts on this device"
        yield Result("capacity", workload, value, goal, None)
        return
    peak = torch.cuda.max_memory_allocated() - before
    off = needed.total / peak - 1
    value = f"predicted {mib(needed.total)}, allocated {mib(peak)}: {100 * off:+.1f} %"
    yield Result("capacity", workload, value, goal, abs(off) <= 0.1)


def _trainable(config: Any, bench: Bench, batch: int, seq: int) -> tuple[Any, Tensor]:
    from transformers import LlamaForCausalLM

    with torch.device(bench.device):
        model = LlamaForCausalLM(config).to(BF16)
        ids = torch.randint(config.vocab_size, (batch, seq))
    inject(model, PROJECTIONS, r=R)
    return model.train(), ids
