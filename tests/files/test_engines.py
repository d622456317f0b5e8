"""What engines make of our PEFT directories: vLLM's, SGLang's and llama.cpp's own readers.

Where one is not installed its cases are skipped; ``python -m benchmarks clients`` counts them.
"""

import copy
import functools
import re
import warnings

import pytest
import torch
import transformers as tf
from engines import BLOCKS, by_llama_cpp, by_sglang, by_vllm, changes_of, require
from families import DECODER, llama, mixtral, qwen3_moe
from helpers import PEFT_WARNS, randomize_adapters
from test_checkpoint_names import DOWN, GATE_UP, ROUTER, built

from lora_inject import LoRAInjectWarning, inject, save, strip

pytestmark = [pytest.mark.cpu("it is about files"), PEFT_WARNS]


def gpt_oss():
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(**DECODER, head_dim=4, num_local_experts=4, num_experts_per_tok=2)
    )


MODELS = {"llama": llama, "mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
UNEQUAL = {"q_proj": {"r": 2, "alpha": 3}, "v_proj": {"r": 3, "alpha": 8}, "down_proj": {"r": 1}}
EVEN = {"q_proj": {}, "k_proj": {}, "v_proj": {}, "o_proj": {}}
# What vLLM, SGLang and llama.cpp make of a file that is not portable; of a portable one, the same.
# "equal", "refused" (they say so, or fail), "otherwise" (read as something else, of which we warn);
# "-" where the engine is not asked.
CASES = {
    "all linear layers": ("llama", "all-linear", "equal equal equal"),
    "unequal ranks": ("llama", UNEQUAL, "equal refused otherwise"),
    "rslora": ("llama", {n: {"scaling": "rslora"} for n in EVEN}, "equal otherwise otherwise"),
    "q alone": ("llama", ["q_proj"], "equal refused equal"),
    "k and v": ("llama", ["k_proj", "v_proj"], "equal refused equal"),
    "up alone": ("llama", ["up_proj"], "equal refused equal"),
    "gate and down": ("llama", ["gate_proj", "down_proj"], "equal equal equal"),
    "experts, Qwen3": ("qwen3_moe", [GATE_UP, DOWN], "refused refused refused"),
    "half of experts, Qwen3": ("qwen3_moe", [GATE_UP], "refused refused refused"),
    "experts and attention, Qwen3": (
        "qwen3_moe", {GATE_UP: {"r": 1}, DOWN: {"r": 2}, **EVEN}, "refused refused refused"
    ),
    "experts, Mixtral": ("mixtral", [GATE_UP, DOWN], "otherwise refused refused"),
    "half of experts, Mixtral": ("mixtral", [DOWN], "otherwise refused refused"),
    "router, Mixtral": ("mixtral", [ROUTER, "o_proj"], "otherwise - equal"),
    "experts, gpt-oss": ("gpt_oss", [GATE_UP, DOWN, "o_proj"], "equal - -"),
    "half of experts, gpt-oss": ("gpt_oss", [GATE_UP], "refused - -"),
}  # fmt: skip
ENGINES = ("vllm", "sglang", "llama.cpp")


def case(engine, name, portable):
    model, targets, outcomes = CASES[name]
    outcome = "equal" if portable else outcomes.split()[ENGINES.index(engine)]
    what = f"{name}{'' if portable else ', not portable'}"
    mark = pytest.mark.client(engine, outcome, what=what)
    return pytest.param(
        engine, model, targets, portable, outcome, marks=mark, id=f"{engine}: {what}"
    )


ALL = [
    case(engine, name, portable)
    for name, (*_, outcomes) in CASES.items()
    for engine, outcome in zip(ENGINES, outcomes.split(), strict=True)
    for portable in (False, True)
    if outcome != "-"
]


@functools.cache
def base_of(name):
    return built(MODELS[name])


def expected_changes(base, model):
    """What an adapter adds, by the names of checkpoints, experts in one tensor."""
    former, changes = base.state_dict(), {}
    block = BLOCKS.get(base.config.model_type, ("mlp", None))[0]
    merged = strip(copy.deepcopy(model), merge=True).state_dict()
    for name, W in merged.items():
        path = name.removesuffix(".weight").replace(".mlp.", f".{block}.")
        change = W - former[name]
        if base.config.model_type == "gpt_oss" and ".experts." in path:
            change = change.mT
            path = path.removesuffix("_proj")
        elif path.endswith("experts.gate_up_proj"):
            above = path.removesuffix("gate_up_proj")
            changes[f"{above}gate"], changes[f"{above}up"] = change.chunk(2, dim=1)
            continue
        elif path.endswith("experts.down_proj"):
            path = path.removesuffix("_proj")
        changes[path] = change
    return {path: change for path, change in changes.items() if change.any()}


def read_by(engine, base, folder, tmp_path, monkeypatch):
    if engine == "vllm":
        return by_vllm(base, folder)
    if engine == "sglang":
        return by_sglang(base, folder, monkeypatch)
    return changes_of(by_llama_cpp(base, folder, tmp_path, monkeypatch))[1]


def is_same(found, expected):
    found = {path: change for path, change in found.items() if change.any()}
    return found.keys() == expected.keys() and all(
        torch.allclose(found[path], change, atol=1e-5) for path, change in expected.items()
    )


@pytest.mark.parametrize(("engine", "name", "targets", "portable", "outcome"), ALL)
def test_an_engine_adds_what_we_add(
    engine, name, targets, portable, outcome, tmp_path, monkeypatch
):
    require(engine)
    base = base_of(name)
    model = copy.deepcopy(base)
    settings = {"r": 2, "alpha": 6}
    if isinstance(targets, dict):
        inject(model, {target: {**settings, **own} for target, own in targets.items()})
    else:
        inject(model, targets, **settings)
    randomize_adapters(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LoRAInjectWarning)
        save(model, tmp_path / "a", portable=portable)
    misread = [w for w in said if re.search("would be misread by", str(w.message))]
    if outcome == "refused":
        with pytest.raises((ValueError, AssertionError, KeyError, RuntimeError)):
            read_by(engine, base, tmp_path / "a", tmp_path, monkeypatch)
    else:
        found = read_by(engine, base, tmp_path / "a", tmp_path, monkeypatch)
        if engine == "llama.cpp":  # by its own names
            save(model, tmp_path / "ours.gguf", format="gguf")
            expected = changes_of(tmp_path / "ours.gguf")[1]
        else:
            expected = expected_changes(base, model)
        assert is_same(found, expected) == (outcome == "equal")
    assert bool(misread) >= (outcome != "equal")
    assert not (portable and misread)
