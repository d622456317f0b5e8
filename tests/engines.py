"""The LoRA readers of vLLM, SGLang and llama.cpp: their own code, over models that are not built.

Which modules their models have, and what these are made of, is written down here (the models of
vLLM 0.33 in model_executor/models, of SGLang 0.5.23 in srt/models); what a directory holds for
them, and with which scaling, is their own code's. Each function returns what the engine would add,
by the names of checkpoints, experts in one tensor, and leaves out what the engine leaves out.

vLLM and SGLang are read without what they serve with: ``pip install --no-deps vllm sglang``, and
what their imports miss. llama.cpp's converter is at ``$LLAMA_CPP``, a directory with its source.
"""

import importlib
import os
import re
import runpy
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Where the experts of an architecture stand, and what their gate, down and up are called.
BLOCKS = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp", ("gate_proj", "down_proj", "up_proj")),
    "gpt_oss": ("mlp", None),  # fused in the checkpoint too
}


def require(engine):
    """Skip the test of an engine whose reader is not here."""
    if engine != "llama.cpp":
        pytest.importorskip(engine, reason=f"{engine} is not installed")
    elif "LLAMA_CPP" not in os.environ:
        pytest.skip("$LLAMA_CPP names no directory with the source of llama.cpp")


def in_vllm(model):
    """The layers of vLLM's model that take adapters, by path."""
    kind = model.config.model_type
    block, _ = BLOCKS.get(kind, ("mlp", None))
    attention = "attn" if kind == "gpt_oss" else "self_attn"
    paths = []
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        paths += [f"{layer}.{attention}.qkv_proj", f"{layer}.{attention}.o_proj"]
        if kind not in BLOCKS:
            paths += [f"{layer}.mlp.gate_up_proj", f"{layer}.mlp.down_proj"]
        else:
            router = "router" if kind == "gpt_oss" else "gate"
            paths += [f"{layer}.{block}.{router}", f"{layer}.{block}.experts"]
    return paths


def _vllm():
    names = ("lora.lora_model", "lora.peft_helper", "lora.model_manager", "lora.layers",
             "config.lora", "model_executor.models.gpt_oss")  # fmt: skip
    return [importlib.import_module(f"vllm.{name}") for name in names]


def _experts_layer(layers, model, fused):
    """vLLM's layer of experts with what its manager asks of it, on one device."""
    cls = layers.FusedMoE3DWithLoRA if fused else layers.FusedMoEWithLoRA
    experts = getattr(model.config, "num_local_experts", None) or model.config.num_experts
    own = {
        "use_ep": False,
        "ep_rank": 0,
        "local_num_experts": experts,
        "global_num_experts": experts,
        "w13_lora_a_stacked": (torch.zeros(1, experts),),
    }
    return object.__new__(type(cls.__name__, (cls,), own))


def by_vllm(model, folder):
    """What vLLM adds. It raises where it refuses a directory."""
    lora_model, helper, manager_module, layers, config, gpt_oss = _vllm()
    lora_model.PIN_MEMORY = manager_module.PIN_MEMORY = False  # without a GPU
    kind = model.config.model_type
    names = BLOCKS.get(kind, ("", None))[1]
    manager = object.__new__(manager_module.LoRAModelManager)
    fused = kind in BLOCKS and names is None
    manager.is_pooling_model = manager._is_non_gated_moe = False
    manager._enable_moe_shared_loras = manager._enable_mixed_moe_lora_format = False
    manager._is_3d_moe_model = fused
    manager.packed_modules, manager.packed_modules_mapping = {}, {
        name: list(parts) for name, parts in GROUPS.items()
    }  # fmt: skip
    if names:
        experts = getattr(model.config, "num_local_experts", None) or model.config.num_experts
        manager.packed_modules_mapping["experts"] = [
            f"experts.{e}.{name}" for e in range(experts) for name in names
        ]
    manager.model = types.SimpleNamespace()
    manager.modules = {}
    for path in in_vllm(model):
        experts = path.endswith(".experts")
        manager.modules[path] = _experts_layer(layers, model, fused) if experts else None
        manager._register_packed_modules(path)
    known = {path.rpartition(".")[2] for path in manager.modules}
    packed = manager.packed_modules_mapping
    expected = {own for name in known for own in packed.get(name, [name])} | known
    peft = helper.PEFTHelper.from_local_dir(str(folder), None)
    peft.validate_legal(config.LoRAConfig(max_lora_rank=16))
    mapper = gpt_oss.GptOssForCausalLM.hf_to_vllm_mapper.get_rename_mapper() if fused else None
    read = lora_model.LoRAModel.from_local_checkpoint(
        str(folder), expected, peft, device="cpu", dtype=torch.float32, weights_mapper=mapper
    )
    manager._validate_moe_lora_format(read)
    manager._create_merged_loras_inplace(read)
    return _products(model, {path: read.get_lora(path) for path in manager.modules})


def _products(model, found):
    """B A by the names of checkpoints of what vLLM holds for its layers."""
    changes = {}
    for path, own in found.items():
        above, _, name = path.rpartition(".")
        if own is None:
            continue
        names = GROUPS.get(name, (name,))
        if name == "experts":
            names = ("experts.gate", "experts.down", "experts.up")
            names = names if len(own.lora_a) == 3 else ("experts.gate_up", "experts.down")
        As, Bs = (t if isinstance(t, list) else [t] for t in (own.lora_a, own.lora_b))
        for part, A, B in zip(names, As, Bs, strict=True):
            if A is not None:
                changes[f"{above}.{part}".replace(".attn.", ".self_attn.")] = B @ A
    return changes


def _sglang(monkeypatch):
    """SGLang's reader of adapters, without the modules that need what it serves with."""
    heavy = {
        "sglang.srt.configs.load_config": {"LoadConfig": object},
        "sglang.srt.layers.utils": {"get_layer_id": _layer_id},
        "sglang.srt.lora.backend.base_backend": {"BaseLoRABackend": object},
        "sglang.srt.lora.utils": {"get_normalized_target_modules": lambda names: {"all"}},
        "sglang.srt.model_loader.loader": {"DefaultModelLoader": object},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
    }
    parents = ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.backend",
               "sglang.srt.configs", "sglang.srt.layers", "sglang.srt.model_loader",
               "sglang.srt.utils")  # fmt: skip
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]).parent
    for name in (*parents, *heavy):
        module = types.ModuleType(name)
        module.__path__ = [str(root / name.replace(".", "/"))] if name in parents else []
        vars(module).update(heavy.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("lora", "lora_config"):
        monkeypatch.delitem(sys.modules, f"sglang.srt.lora.{name}", raising=False)
    own = [importlib.import_module(f"sglang.srt.lora.{name}") for name in ("lora", "lora_config")]
    for name in ("lora", "lora_config"):
        monkeypatch.delitem(sys.modules, f"sglang.srt.lora.{name}")
    return own


def _layer_id(name):
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def by_sglang(model, folder, monkeypatch):
    """What SGLang adds. It raises where it fails at a directory."""
    lora, lora_config = _sglang(monkeypatch)
    config = lora_config.LoRAConfig(path=str(folder))
    adapter = lora.LoRAAdapter("a", config, model.config, None, None)
    adapter.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    changes = {}
    for layer in adapter.layers:
        for key, A in layer.weights.items():
            if "lora_A" in key:
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = layer.weights[key.replace("lora_A", "lora_B")]
                changes |= _slices(model, path, A, B, adapter.scaling, config.r)
    return _with_experts_together(changes)


def _slices(model, path, A, B, scaling, r):
    """The parts of a layer of SGLang, each with its own r rows of A (srt/lora/layers.py)."""
    above, _, name = path.rpartition(".")
    block = BLOCKS.get(model.config.model_type, ("mlp", None))[0]
    if ".experts" in path and not re.search(r"experts\.\d+\.", path):
        raise ValueError(f"{path}: experts are read one by one")
    if f".{block}." not in f"{path}." and ".self_attn." not in path:
        return {}
    if name not in GROUPS and any(name in own for own in GROUPS.values()):
        raise ValueError(f"{path}: no buffer has its name")  # get_target_module_name of utils.py
    names = GROUPS.get(name, (name,))
    As = A.split(r) if name in GROUPS else [A]
    if len(As) != len(names) or any(len(own) != r for own in As):
        raise ValueError(f"{path}: A has {len(A)} rows, and not {len(names)} times {r}")
    sizes = _sizes(model, name, len(B))
    return {
        f"{above}.{own}": scaling * b @ a
        for own, a, b in zip(names, As, B.split(sizes), strict=True)
    }


def _sizes(model, name, rows):
    if name != "qkv_proj":
        return [rows // len(GROUPS.get(name, (name,)))] * len(GROUPS.get(name, (name,)))
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    size = rows // (heads + 2 * keys)
    return [heads * size, keys * size, keys * size]


def _with_experts_together(changes):
    together, experts = {}, {}
    for path, change in changes.items():
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj", path):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = change
        else:
            together[path] = change
    for path, own in experts.items():
        together[path] = torch.stack([own[e] for e in sorted(own)])
    return together


_THEIRS = {}  # llama.cpp has a gguf of its own, newer than the package


@contextmanager
def _modules_of_llama_cpp():
    def taken():
        names = [name for name in sys.modules if name.split(".")[0] in ("gguf", "conversion")]
        return {name: sys.modules.pop(name) for name in names}

    ours = taken()
    sys.modules.update(_THEIRS)
    try:
        yield
    finally:
        _THEIRS.update(taken())
        sys.modules.update(ours)


def by_llama_cpp(model, folder, tmp_path, monkeypatch):
    """A GGUF file that llama.cpp's converter makes of a directory. It raises where that fails."""
    source = os.environ["LLAMA_CPP"]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    converter = Path(source) / "convert_lora_to_gguf.py"
    target = tmp_path / "theirs.gguf"
    arguments = [str(folder), "--base", str(tmp_path / "base"), "--outfile", str(target)]
    with monkeypatch.context() as patch, _modules_of_llama_cpp():
        patch.setattr(sys, "argv", [str(converter), *arguments])
        patch.syspath_prepend(source)
        try:  # in this process, which has imported what it needs
            runpy.run_path(str(converter), run_name="__main__")
        except SystemExit as end:
            raise ValueError(f"the converter ended with {end.code}") from end
    return target


def tensors_of(path):
    """(alpha, the tensors by name) of a GGUF file."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora"
    return said, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def changes_of(path):
    """What llama.cpp adds to each of its tensors."""
    said, tensors = tensors_of(path)
    changes = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = said["adapter.lora.alpha"] / B.shape[-1]
        # Of embeddings it takes rows of A, and multiplies them by B.
        changes[name] = scale * (A @ B.T if name.startswith("token_embd") else B @ A)
    return said["general.architecture"], changes
