"""Experts apart and older paths: files by the names of checkpoints, which PEFT too reads and wrote.

Transformers 4 had a module for each expert, with the names that their checkpoints still have.
"""

import copy
import json

import pytest
import torch
import transformers as tf
from families import DECODER, mixtral, qwen3_moe
from helpers import PEFT_WARNS, randomize_adapters
from safetensors.torch import load_file, save_file

from lora_inject import FormatError, convert, inject, load, save, strip

pytestmark = [pytest.mark.cpu("it is about files"), PEFT_WARNS]
SAFE = "adapter_model.safetensors"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ROUTER = r"re:.*mlp\.gate\.weight"
# What transformers 4 called the modules of a layer: the block of experts; gate, up and down.
OLD = {
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": (qwen3_moe, "mlp", ("gate_proj", "up_proj", "down_proj")),
}
TARGETS = {
    "experts": [GATE_UP, DOWN],
    "gate and up": [GATE_UP],
    "down": [DOWN],
    "all": [GATE_UP, DOWN, "q_proj", "o_proj", ROUTER],
    "router": ["v_proj", ROUTER],
    "one block": ["layers.0.mlp.experts.gate_up_proj", "k_proj"],
}


def built(make):
    torch.manual_seed(0)
    return make().eval()


def ours(base, folder):
    """The weights of a copy of a model with the adapter of a file in them."""
    return strip(load(copy.deepcopy(base), folder), merge=True).state_dict()


def theirs(base, folder):
    """The same by PEFT."""
    import peft

    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return model.merge_and_unload().state_dict()


def assert_same(one, other, base):
    assert one.keys() == other.keys()
    for name, W in one.items():
        assert torch.allclose(W, other[name], atol=1e-6), name
    assert any(not torch.equal(W, base.state_dict()[name]) for name, W in one.items())


def adapted(base, targets, **options):
    model = copy.deepcopy(base)
    inject(model, targets, **{"r": 2, "alpha": 6, **options})
    randomize_adapters(model)
    return model


def write_old(folder, shapes, targets, r=2, alpha=6):
    """A directory as PEFT wrote it under transformers 4, of modules by path with (out, in)."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, (n_out, n_in) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, n_in)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(n_out, r)
    save_file(tensors, folder / SAFE)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, "r": r,
              "lora_alpha": alpha, "base_model_name_or_path": None}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def old_experts(model, name, projections=(0, 1, 2)):
    """The shapes of the modules of transformers 4 for the experts of a model of transformers 5."""
    _, block, names = OLD[name]
    shapes = {}
    for i, layer in enumerate(model.model.layers):
        up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        sizes = [(up.shape[1] // 2, up.shape[2])] * 2 + [tuple(down.shape[1:])]
        for e in range(len(up)):
            for p in projections:
                shapes[f"model.layers.{i}.{block}.experts.{e}.{names[p]}"] = sizes[p]
    return shapes


@pytest.mark.client("peft")
@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("targets", TARGETS)
def test_a_portable_file_of_experts_is_one_of_transformers_4(name, targets, tmp_path):
    make, block, names = OLD[name]
    base = built(make)
    model = adapted(base, TARGETS[targets])
    save(model, tmp_path, portable=True)
    keys = load_file(tmp_path / SAFE)
    if "experts" in "".join(TARGETS[targets]):
        experts = f"base_model.model.model.layers.0.{block}.experts"
        for e in range(4):
            for own in names:
                assert keys[f"{experts}.{e}.{own}.lora_A.weight"].shape[0] == 2
    else:
        assert keys[f"base_model.model.model.layers.0.{block}.gate.lora_A.weight"].shape[0] == 2
    assert not any("base_layer" in key or ".experts.lora" in key for key in keys)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    if targets != "one block":  # by the names of transformers 4 there are others
        assert all("." not in target for target in config["target_modules"])
    expected = strip(model, merge=True).state_dict()
    assert_same(ours(base, tmp_path), expected, base)
    assert_same(theirs(base, tmp_path), expected, base)


@pytest.mark.parametrize("name", OLD)
def test_experts_that_were_taken_apart_are_put_together_as_they_were(name, tmp_path):
    base = built(OLD[name][0])
    model = adapted(base, [GATE_UP, DOWN], alpha=2)
    save(model, tmp_path, portable=True)
    again = load(copy.deepcopy(base), tmp_path)
    own = dict(model.named_parameters())
    for key, value in again.named_parameters():
        assert torch.equal(value, own[key]), key
    randomize_adapters(model)
    load(model, tmp_path)  # into the adapter that is there
    assert all(torch.equal(v, dict(again.named_parameters())[k]) for k, v in own.items())


def test_experts_inside_of_a_model_of_ones_own_stay_in_one_and_a_warning_says_so(tmp_path):
    model = torch.nn.ModuleDict({"inner": built(mixtral)})
    inject(model, [GATE_UP, "q_proj"], r=2)
    randomize_adapters(model)
    with pytest.warns(UserWarning, match="inner.*gate_up_proj.*no model of transformers"):
        save(model, tmp_path, portable=True)
    assert any(key.endswith("experts.lora_A.weight") for key in load_file(tmp_path / SAFE))
    base = torch.nn.ModuleDict({"inner": built(mixtral)})
    assert_same(ours(base, tmp_path), strip(model, merge=True).state_dict(), base)


@pytest.mark.client("peft")
@pytest.mark.parametrize("name", OLD)
def test_experts_of_transformers_4_load_as_peft_loads_them(name, tmp_path):
    make, block, names = OLD[name]
    base = built(make)
    shapes = old_experts(base, name)
    shapes |= {f"model.layers.{i}.{block}.gate": (4, 16) for i in range(2)}
    shapes["model.layers.1.self_attn.q_proj"] = tuple(
        base.model.layers[1].self_attn.q_proj.weight.shape
    )
    folder = write_old(tmp_path / "a", shapes, [*names, "gate", "q_proj"])
    model = load(copy.deepcopy(base), folder)
    assert model.model.layers[0].mlp.experts.gate_up_proj_lora_A.shape[1] == 4  # gate's and up's
    assert_same(ours(base, folder), theirs(base, folder), base)
    save(model, tmp_path / "b", portable=True)
    assert_same(ours(base, tmp_path / "b"), ours(base, folder), base)


@pytest.mark.client("peft")
def test_older_paths_of_a_model_of_images_and_text_load_as_peft_loads_them(tmp_path):
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**DECODER))
    base = built(lambda: tf.LlavaForConditionalGeneration(config))
    q = base.model.language_model.layers[0].self_attn.q_proj.weight
    projector = base.model.multi_modal_projector.linear_1.weight
    shapes = {
        "language_model.model.layers.0.self_attn.q_proj": tuple(q.shape),
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": (16, 16),
        "multi_modal_projector.linear_1": tuple(projector.shape),
    }
    folder = write_old(tmp_path / "a", shapes, ["q_proj", "linear_1"])
    found, by_peft = ours(base, folder), theirs(base, folder)
    name = "model.multi_modal_projector.linear_1.weight"
    keys = load_file(folder / SAFE)
    start = "base_model.model.multi_modal_projector.linear_1.lora_"
    update = 3 * keys[f"{start}B.weight"] @ keys[f"{start}A.weight"]
    assert torch.allclose(found[name], base.state_dict()[name] + update, atol=1e-6)
    by_peft[name] = found[name]  # which PEFT 0.21 leaves out, and says nothing of
    assert_same(found, by_peft, base)


def test_what_a_file_has_of_some_experts_alone_changes_nothing_of_the_others(tmp_path):
    base = built(mixtral)
    shapes = old_experts(base, "mixtral", projections=(1,))
    shapes = {path: shape for path, shape in shapes.items() if ".experts.2." in path}
    tensors = load_file(write_old(tmp_path / "a", shapes, ["w3"]) / SAFE)
    found, former = ours(base, tmp_path / "a"), base.state_dict()
    for i in range(2):
        key = f"base_model.model.model.layers.{i}.block_sparse_moe.experts.2.w3.lora_"
        name = f"model.layers.{i}.{GATE_UP}"
        expected = former[name].clone()
        half = expected.shape[1] // 2
        expected[2, half:] += 3 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        assert torch.allclose(found[name], expected, atol=1e-6)
    assert all(torch.equal(found[k], W) for k, W in former.items() if not k.endswith(GATE_UP))


@pytest.mark.client("peft")
def test_fused_experts_of_a_checkpoint_that_has_them_so_stay_and_get_their_partner(tmp_path):
    def make():
        return tf.GptOssForCausalLM(
            tf.GptOssConfig(**DECODER, head_dim=4, num_local_experts=4, num_experts_per_tok=2)
        )

    base = built(make)
    model = adapted(base, ["experts.gate_up_proj", "q_proj"])
    save(model, tmp_path, portable=True)
    keys = load_file(tmp_path / SAFE)
    block = "base_model.model.model.layers.0.mlp.experts"
    assert keys[f"{block}.base_layer.lora_B.weight"].any()
    assert not keys[f"{block}.lora_B.weight"].any()
    again = load(copy.deepcopy(base), tmp_path)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    expected = strip(model, merge=True).state_dict()
    assert_same(ours(base, tmp_path), expected, base)
    assert_same(theirs(base, tmp_path), expected, base)


def test_a_group_that_is_adapted_in_part_gets_zeros_that_are_not_loaded_again(tmp_path):
    base = built(mixtral)
    model = adapted(base, {"v_proj": {"r": 3, "alpha": 1}, "o_proj": {}})
    save(model, tmp_path, portable=True)
    keys = load_file(tmp_path / SAFE)
    block = "base_model.model.model.layers.0.self_attn"
    for name in ("q_proj", "k_proj"):
        assert keys[f"{block}.{name}.lora_A.weight"].shape[0] == 3
        assert not keys[f"{block}.{name}.lora_B.weight"].any()
    again = load(copy.deepcopy(base), tmp_path)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("end", ["A", "B"])
def test_an_expert_of_another_size_is_refused_and_nothing_changes(end, tmp_path):
    base = built(mixtral)
    folder = write_old(tmp_path / "a", old_experts(base, "mixtral"), ["w1", "w2", "w3"])
    tensors = load_file(folder / SAFE)
    key = f"base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.lora_{end}.weight"
    tensors[key] = torch.randn(2, 7) if end == "A" else torch.randn(7, 2)
    save_file(tensors, folder / SAFE)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(FormatError, match=r"experts\.3\.w1"):
        load(base, folder)
    assert base.state_dict().keys() == before.keys()


def test_a_dora_of_experts_apart_is_refused(tmp_path):
    base = built(mixtral)
    folder = write_old(tmp_path / "a", old_experts(base, "mixtral"), ["w1", "w2", "w3"])
    tensors, config = load_file(folder / SAFE), folder / "adapter_config.json"
    for key in [key for key in tensors if "lora_B" in key]:
        name = key.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[name] = torch.ones(len(tensors[key]))
    save_file(tensors, folder / SAFE)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(FormatError, match=r"dora.*one weight of all experts"):
        load(base, folder)


@pytest.mark.client("peft")
@pytest.mark.parametrize("name", OLD)
def test_experts_apart_are_converted_to_fused_ones_and_back(name, tmp_path):
    base = built(OLD[name][0])
    save(adapted(base, [GATE_UP, DOWN]), tmp_path / "apart", portable=True)
    convert(tmp_path / "apart", tmp_path / "fused", to="peft", model=copy.deepcopy(base))
    expected = ours(base, tmp_path / "apart")
    assert_same(ours(base, tmp_path / "fused"), expected, base)
    assert_same(theirs(base, tmp_path / "fused"), expected, base)
    with pytest.raises(FormatError, match=r"how many experts .* by its model alone.*--model"):
        convert(tmp_path / "fused", tmp_path / "again", to="peft")


def test_experts_in_loralibs_format_load_onto_the_bare_model(tmp_path):
    base = built(mixtral)
    model = adapted(base, [GATE_UP, "q_proj"])
    save(model, tmp_path / "a.pt", format="loralib")
    loaded = load(copy.deepcopy(base), tmp_path / "a.pt", alpha=6)
    merged = [strip(each, merge=True).state_dict() for each in (loaded, model)]
    assert_same(*merged, base)
