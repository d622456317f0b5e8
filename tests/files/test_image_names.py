"""Files in the names of every tool for images: the tools' own arithmetic written out, by weight.

Where a name stands, of which module it is here, and what is in front and behind was taken from
ComfyUI 0.38 (comfy/lora.py, utils.py, weight_adapter/lora.py), sd-scripts 0.9.1 (networks/lora.py,
lora_flux.py, convert_flux_lora.py, library/sdxl_model_util.py), A1111 (Lora/networks.py), diffusers
0.42 (utils/state_dict_utils.py) and ai-toolkit (toolkit/network_mixins.py).
"""

import json

import pytest
import torch
from image_models import (
    build,
    changes,
    random_layer,
    require_changes,
    save_tensors,
    update,
    weights,
)
from safetensors.torch import save_file

from lora_inject import FormatError, LoRAInjectWarning, load

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
OLD = ("_lora.down.weight", "_lora.up.weight")
LESS_OLD = (".lora.down.weight", ".lora.up.weight")
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
UNIT, BLOCK = "attentions.0.transformer_blocks.0", "transformer_blocks_0"
LAYER, FLAT_LAYER = "encoder.layers.1", "text_model_encoder_layers_1"
SINGLE, FLAT_SINGLE = "single_transformer_blocks.1", "lora_transformer_single_transformer_blocks_1"
DOUBLE, FLAT_DOUBLE = "transformer_blocks.0", "lora_transformer_transformer_blocks_0"
DOWN, UP, MID = f"down_blocks.0.{UNIT}", f"up_blocks.1.{UNIT}", f"mid_block.{UNIT}"

# By style: the model, what is behind the names, alpha, and our modules by the tool's name.
STYLES = {
    "kohya, SD 1.5": ("sd", KOHYA, 3.0, {
        f"lora_unet_down_blocks_0_attentions_0_{BLOCK}_attn1_to_q": f"{DOWN}.attn1.to_q",
        f"lora_unet_up_blocks_1_attentions_0_{BLOCK}_attn2_to_out_0": f"{UP}.attn2.to_out.0",
        "lora_unet_mid_block_attentions_0_proj_in": "mid_block.attentions.0.proj_in",
        "lora_unet_down_blocks_0_resnets_0_conv1": "down_blocks.0.resnets.0.conv1",
        "lora_unet_down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
    }),
    "checkpoints of SD 1.5": ("sd", KOHYA, 1.0, {
        "lora_unet_input_blocks_0_0": "conv_in",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
        "lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        f"lora_unet_input_blocks_1_1_{BLOCK}_attn1_to_q": f"{DOWN}.attn1.to_q",
        "lora_unet_input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        f"lora_unet_middle_block_1_{BLOCK}_ff_net_0_proj": f"{MID}.ff.net.0.proj",
        "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "lora_unet_output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv",
        f"lora_unet_output_blocks_2_1_{BLOCK}_attn2_to_k": f"{UP}.attn2.to_k",
        "lora_unet_out_2": "conv_out",
    }),
    "kohya, SDXL": ("sdxl", KOHYA, 4.0, {
        "lora_unet_input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_v":
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v",
        f"lora_unet_output_blocks_1_1_{BLOCK}_attn1_to_out_0":
            "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        "lora_unet_output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "lora_unet_output_blocks_3_0_in_layers_2": "up_blocks.1.resnets.1.conv1",
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
    }),
    "kohya, Flux": ("flux", KOHYA, 1.5, {
        "lora_unet_double_blocks_0_img_attn_qkv": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
        "lora_unet_double_blocks_0_txt_attn_qkv": [f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"],
        "lora_unet_double_blocks_0_img_attn_proj": f"{DOUBLE}.attn.to_out.0",
        "lora_unet_double_blocks_0_txt_attn_proj": f"{DOUBLE}.attn.to_add_out",
        "lora_unet_double_blocks_0_img_mod_lin": "transformer_blocks.0.norm1.linear",
        "lora_unet_double_blocks_0_txt_mlp_2": "transformer_blocks.0.ff_context.net.2",
        "lora_unet_single_blocks_1_linear1": [
            *(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp",
        ],
        "lora_unet_single_blocks_1_linear2": f"{SINGLE}.proj_out",
        "lora_unet_single_blocks_1_modulation_lin": f"{SINGLE}.norm.linear",
        "lora_unet_img_in": "x_embedder",
        "lora_unet_guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
        "lora_unet_final_layer_linear": "proj_out",
    }),
    "ComfyUI's generic names, Flux": ("flux", PEFT, None, {
        "diffusion_model.double_blocks.0.img_attn.qkv": [f"{DOUBLE}.attn.to_{x}" for x in "qkv"],
        "diffusion_model.single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    }),
    "ai-toolkit, Flux": ("flux", PEFT, None, {
        f"transformer.{DOUBLE}.attn.to_q": f"{DOUBLE}.attn.to_q",
        "transformer.transformer_blocks.0.ff.net.0.proj": "transformer_blocks.0.ff.net.0.proj",
        f"transformer.{SINGLE}.proj_mlp": f"{SINGLE}.proj_mlp",
    }),
    "OneTrainer, Flux": ("flux", KOHYA, 5.0, {
        f"{FLAT_DOUBLE}_attn_add_q_proj": f"{DOUBLE}.attn.add_q_proj",
        f"{FLAT_SINGLE}_proj_out": f"{SINGLE}.proj_out",
    }),
    "kohya, text encoder": ("clip", KOHYA, 3.0, {
        f"lora_te_{FLAT_LAYER}_self_attn_q_proj": f"{LAYER}.self_attn.q_proj",
        f"lora_te_{FLAT_LAYER}_mlp_fc1": f"{LAYER}.mlp.fc1",
    }),
    "kohya, SDXL's first": ("clip", KOHYA, 3.0, {
        f"lora_te1_{FLAT_LAYER}_self_attn_out_proj": f"{LAYER}.self_attn.out_proj",
    }),
    "kohya, SDXL's second": ("clip_with_projection", KOHYA, 3.0, {
        f"lora_te2_{FLAT_LAYER}_mlp_fc2": f"text_model.{LAYER}.mlp.fc2",
        "lora_te2_text_projection": "text_projection",
    }),
    "kohya, T5": ("t5", KOHYA, 3.0, {
        "lora_te3_encoder_block_1_layer_0_SelfAttention_q":
            "encoder.block.1.layer.0.SelfAttention.q",
    }),
    "diffusers' first names": ("sd", OLD, None, {
        f"unet.{DOWN}.attn1.processor.to_q": f"{DOWN}.attn1.to_q",
        f"unet.{MID}.attn2.processor.to_out": f"{MID}.attn2.to_out.0",
    }),
    "the same, of a UNet alone": ("sd", OLD, None, {
        f"{DOWN}.attn1.processor.to_k": f"{DOWN}.attn1.to_k",
        f"{MID}.attn2.processor.to_out": f"{MID}.attn2.to_out.0",
    }),
    "diffusers' second names": ("sd", LESS_OLD, None, {
        f"unet.{DOWN}.attn1.to_q": f"{DOWN}.attn1.to_q",
        f"unet.{MID}.attn2.to_out.0": f"{MID}.attn2.to_out.0",
        "unet.mid_block.resnets.0.conv1": "mid_block.resnets.0.conv1",
    }),
    "diffusers' text encoder, first": ("clip", OLD, None, {
        f"text_encoder.text_model.{LAYER}.self_attn.to_q": f"{LAYER}.self_attn.q_proj",
        f"text_encoder.text_model.{LAYER}.self_attn.to_out": f"{LAYER}.self_attn.out_proj",
    }),
    "diffusers' text encoder, second": ("clip", LINEAR, None, {
        f"text_encoder.text_model.{LAYER}.self_attn.v_proj": f"{LAYER}.self_attn.v_proj",
        f"text_encoder.text_model.{LAYER}.mlp.fc2": f"{LAYER}.mlp.fc2",
    }),
    "diffusers, transformers 4": ("clip", PEFT, None, {
        f"text_encoder.text_model.{LAYER}.self_attn.k_proj": f"{LAYER}.self_attn.k_proj",
    }),
    "diffusers, transformers 5": ("clip_with_projection", PEFT, None, {
        f"text_encoder_2.{LAYER}.self_attn.k_proj": f"text_model.{LAYER}.self_attn.k_proj",
    }),
}  # fmt: skip


def of_style(style, conv=None):
    """(model, tensors of a file, what the tool adds to each of our weights)."""
    name, endings, alpha, modules = STYLES[style]
    model, tensors, expected = build(name), {}, {}
    for theirs, ours in modules.items():
        paths = [ours] if isinstance(ours, str) else ours
        down, up = random_layer(model, paths, conv=conv)
        tensors |= dict(zip((theirs + ending for ending in endings), (down, up), strict=True))
        if alpha is not None:
            tensors[f"{theirs}.alpha"] = torch.tensor(alpha)
        sizes = [model.get_submodule(path).weight.shape[0] for path in paths]
        expected |= dict(zip(paths, update(down, up, alpha).split(sizes), strict=True))
    return name, tensors, expected


COMFYUI, KOHYAS, A1111 = (
    pytest.mark.client(name, rule=rule)
    for name, rule in (("ComfyUI", "0.38"), ("sd-scripts", "0.9.1"), ("A1111", "1.10"))
)
DIFFUSERS = pytest.mark.client("diffusers", rule="its former versions")
CLIENTS = {  # whose the files are
    "kohya": [KOHYAS, A1111], "checkpoints": [A1111], "ComfyUI": [COMFYUI],
    "ai-toolkit": [pytest.mark.client("ai-toolkit", rule="27a03a9")],
    "OneTrainer": [pytest.mark.client("OneTrainer", rule="as ComfyUI reads it")],
    "diffusers": [DIFFUSERS], "the same": [DIFFUSERS],
}  # fmt: skip


def with_clients(style):
    front = next(front for front in CLIENTS if style.startswith(front))
    marks = CLIENTS[front][:1] if "Flux" in style or "T5" in style else CLIENTS[front]
    return pytest.param(style, marks=marks)


@pytest.mark.parametrize("style", [with_clients(style) for style in STYLES])
def test_a_file_adds_what_its_tool_adds(style, tmp_path):
    name, tensors, expected = of_style(style)
    save_tensors(tensors, tmp_path / "a.safetensors")
    require_changes(name, tmp_path / "a.safetensors", expected)


@pytest.mark.parametrize("conv", [False, True])
def test_linear_weights_for_convolutions_and_the_other_way_round(conv, tmp_path):
    style = "kohya, SDXL" if conv else "checkpoints of SD 1.5"  # ComfyUI reshapes to the weight's
    name, tensors, expected = of_style(style, conv)
    if conv:  # a kernel of 1 for what is Linear here, and no other
        model = build(name)
        wide = [path for path in expected if model.get_submodule(path).weight.dim() > 2]
        expected = {path: change for path, change in expected.items() if path not in wide}
        names = [n for n, path in STYLES[style][3].items() if path not in wide]
        tensors = {k: t for k, t in tensors.items() if k.startswith(tuple(names))}
    save_tensors(tensors, tmp_path / "a.safetensors")
    require_changes(name, tmp_path / "a.safetensors", expected)


def test_the_last_layer_of_flux_has_its_halves_exchanged(tmp_path):
    model, name = build("flux"), "lora_unet_final_layer_adaLN_modulation_1"
    down, up = random_layer(model, ["norm_out.linear"])
    save_tensors({f"{name}{e}": t for e, t in zip(KOHYA, (down, up), strict=True)},
                 tmp_path / "a.safetensors")  # fmt: skip
    shift, scale = update(down, up, None).chunk(2)  # swap_scale_shift of ComfyUI and diffusers
    expected = {"norm_out.linear": torch.cat([scale, shift])}
    require_changes("flux", tmp_path / "a.safetensors", expected)


@pytest.mark.parametrize("case", ["rows", "columns"])
def test_a_decomposed_one_of_a_fused_layer(case, tmp_path):
    model, name = build("flux"), "lora_unet_double_blocks_0_img_attn_qkv"
    paths = [f"{DOUBLE}.attn.to_{x}" for x in "qkv"]
    down, up = random_layer(model, paths)
    W = torch.cat([weights(model)[path] for path in paths])
    V = W + update(down, up, 4.0)  # LyCORIS: the lengths of the rows of W + dW become the scale
    scale = torch.rand(V.shape[0], 1) + 0.5 if case == "rows" else torch.rand(1, V.shape[1]) + 0.5
    tensors = {f"{name}{KOHYA[0]}": down, f"{name}{KOHYA[1]}": up, f"{name}.dora_scale": scale}
    save_tensors({**tensors, f"{name}.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    if case == "columns":  # of all three together
        with pytest.raises(FormatError, match=r"qkv is a dora_columns .*cannot be divided"):
            load(model, tmp_path / "a.safetensors")
        return
    change = V * scale / V.norm(dim=1, keepdim=True) - W
    expected = dict(zip(paths, change.chunk(3), strict=True))
    require_changes("flux", tmp_path / "a.safetensors", expected)


def test_a_config_for_fused_names_is_not_left_unread(tmp_path):
    _, tensors, _ = of_style("ComfyUI's generic names, Flux")
    config = {"diffusion_model.r": 2, "diffusion_model.lora_alpha": 4}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(FormatError, match="a config for names that are several layers here"):
        load(build("flux"), tmp_path / "a.safetensors")


def test_lokr_by_the_names_of_lycoris(tmp_path):
    path = f"{DOUBLE}.attn.to_q"
    w1, w2 = torch.randn(4, 2), torch.randn(4, 8)
    name = f"lycoris_{path.replace('.', '_')}"
    save_tensors({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "a.safetensors")
    require_changes("flux", tmp_path / "a.safetensors", {path: torch.kron(w1, w2)})
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    save_tensors({f"{fused}.lokr_w1": w1, f"{fused}.lokr_w2": torch.randn(12, 8)},
                 tmp_path / "b.safetensors")  # fmt: skip
    with pytest.raises(FormatError, match=r"qkv is a lokr .*attn\.to_q, .*cannot be divided"):
        load(build("flux"), tmp_path / "b.safetensors")


def test_ranks_side_by_side_are_each_layers_own(tmp_path):
    """As convert_flux_lora.py of sd-scripts makes them of ai-toolkit's; k is not adapted."""
    model, name = build("flux"), "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(6, 16), torch.zeros(48, 6)
    up[:16, :2], up[32:, 2:5] = torch.randn(16, 2), torch.randn(16, 3)
    up[:, 5] = 0  # of a rank that nobody has trained yet
    tensors = {f"{name}{KOHYA[0]}": down, f"{name}{KOHYA[1]}": up, f"{name}.alpha": torch.ones(())}
    save_tensors(tensors, tmp_path / "a.safetensors")
    load(model, tmp_path / "a.safetensors")
    attention = model.transformer_blocks[0].attn
    assert attention.to_q.lora_A.shape == (3, 16)
    assert attention.to_v.lora_A.shape == (4, 16)
    assert torch.equal(attention.to_q.lora_B[:, :2], up[:16, :2])
    found = changes(build("flux"), model)
    torch.testing.assert_close(found[f"{DOUBLE}.attn.to_q"], up[:16] @ down / 6)
    assert found.keys() == {f"{DOUBLE}.attn.to_{x}" for x in "qv"}


def test_a_part_is_taken_and_the_rest_is_said(tmp_path):
    of = {style: of_style(style) for style in ("kohya, SDXL", "kohya, SDXL's first",
                                               "kohya, SDXL's second")}  # fmt: skip
    tensors = {key: t for _, own, _ in of.values() for key, t in own.items()}
    save_tensors(tensors, tmp_path / "a.safetensors")
    for style, rest in zip(of, ("lora_te1 and .* lora_te2", "lora_te2 and .* lora_unet",
                                "lora_te1 and .* lora_unet"), strict=True):  # fmt: skip
        name, _, expected = of[style]
        with pytest.warns(LoRAInjectWarning, match=f"holds .* of {rest} too, .*load_pipeline"):
            require_changes(name, tmp_path / "a.safetensors", expected)
    with pytest.raises(FormatError, match=r"names are no modules of this T5EncoderModel"):
        load(build("t5"), tmp_path / "a.safetensors")


def test_strange_names_are_refused_and_those_of_others_are_not(tmp_path):
    name, tensors, expected = of_style("kohya, SD 1.5")
    others = {"lora_te_text_model_some_new_thing.lora_down.weight": torch.ones(1, 1),
              "lora_te_text_model_x.diff_b": torch.ones(1)}  # fmt: skip
    save_tensors({**tensors, **others}, tmp_path / "a.safetensors")
    with pytest.warns(LoRAInjectWarning, match="1 layer of lora_te"):
        require_changes(name, tmp_path / "a.safetensors", expected)
    for key, message in (("lora_unet_x.lora_down.weight", "1 names are no modules of this UNet"),
                         ("lora_unet_conv_in.diff_b", "conv_in.diff_b is of no kind")):  # fmt: skip
        save_tensors({**tensors, key: torch.ones(1, 1)}, tmp_path / "b.safetensors")
        with pytest.raises(FormatError, match=message):
            load(build(name), tmp_path / "b.safetensors")
