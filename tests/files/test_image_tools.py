"""What we write for image tools: every name is one that the tool has, and it adds what we add.

The names that ComfyUI, kohya's scripts and A1111 know are written down here from their rules, not
made by the table that is tested; diffusers reads the files itself.
"""

import copy
import re

import pytest
import torch
from helpers import PEFT_WARNS
from image_models import build, changes, pipeline, update, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_inject import (
    FormatError,
    LoRAInjectWarning,
    inject,
    load,
    load_pipeline,
    lora_state_dict,
    save,
    save_pipeline,
)
from lora_inject.core.index import Index
from lora_inject.files.formats.image_names import bfl, sai
from lora_inject.files.formats.image_parts import ModelNames

# The blocks of the small SDXL here by the names of its checkpoints. ComfyUI: unet_to_diffusers of
# comfy/utils.py; sd-scripts: make_unet_conversion_map of library/sdxl_model_util.py.
SDXL_BLOCKS = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
}  # fmt: skip
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
FLUX = {
    **{f"double_blocks.0.{side}_attn.qkv": [f"transformer_blocks.0.attn.{x}" for x in names]
       for side, names in (("img", ("to_q", "to_k", "to_v")),
                           ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")))},
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    **{f"single_blocks.{i}.linear1": [f"single_transformer_blocks.{i}.{x}" for x in
                                      ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
       for i in range(2)},
    **{f"single_blocks.{i}.linear2": [f"single_transformer_blocks.{i}.proj_out"] for i in range(2)},
    **{f"single_blocks.{i}.modulation.lin": [f"single_transformer_blocks.{i}.norm.linear"]
       for i in range(2)},
    "img_in": ["x_embedder"], "txt_in": ["context_embedder"],
    **{f"{name}.{layer}_layer": [f"time_text_embed.{ours}_embedder.linear_{n}"]
       for name, ours in (("time_in", "timestep"), ("vector_in", "text"),
                          ("guidance_in", "guidance"))
       for layer, n in (("in", 1), ("out", 2))},
    "final_layer.linear": ["proj_out"], "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}  # fmt: skip


def sdxl_name(path):
    """The name of one of SDXL's layers in its checkpoints."""
    block = max((b for b in SDXL_BLOCKS if f"{path}.".startswith(f"{b}.")), key=len)
    inside = path[len(block) + 1 :]
    return ".".join(filter(None, (SDXL_BLOCKS[block], RESNET.get(inside, inside))))


def known_names(name):
    """Our layers by the names of kohya's form that ComfyUI finds a weight of the model for."""
    layers = weights(build(name))
    if name == "sd":  # the names of diffusers
        return {f"lora_unet_{path.replace('.', '_')}": [path] for path in layers}
    if name == "sdxl":
        return {f"lora_unet_{sdxl_name(path).replace('.', '_')}": [path] for path in layers}
    if name == "flux":
        return {f"lora_unet_{theirs.replace('.', '_')}": ours for theirs, ours in FLUX.items()}
    front = {"clip": "lora_te1", "clip_with_projection": "lora_te2"}[name]
    paths = {path: path.removeprefix("text_model.") for path in layers if "encoder" in path}
    names = {f"{front}_text_model_{p.replace('.', '_')}": [path] for path, p in paths.items()}
    return {**names, **({"lora_te2_text_projection": ["text_projection"]} if "2" in front else {})}


def adapted(pipe, seed=0, **options):
    """The same pipeline with an adapter on every layer of its components, and trained ones."""
    torch.manual_seed(seed)
    for model in pipe.components.values():
        has_conv = any(isinstance(m, torch.nn.Conv2d) for m in model.modules())
        kinds = [torch.nn.Linear, torch.nn.Conv2d] if has_conv else torch.nn.Linear
        inject(model, kinds, r=2, alpha=3, **options)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("lora_B"):
                    p.normal_()
    return pipe


def own_changes(pipe, like):
    """What is added to each weight, by component."""
    plain = pipeline(**like)
    pairs = {n: (plain.components[n], copy.deepcopy(m)) for n, m in pipe.components.items()}
    return {name: changes(*pair) for name, pair in pairs.items()}


PIPELINES = {
    "SD 1.5": {"unet": "sd", "text_encoder": "clip"},
    "SDXL": {"unet": "sdxl", "text_encoder": "clip", "text_encoder_2": "clip_with_projection"},
    "Flux": {"transformer": "flux", "text_encoder": "clip", "text_encoder_2": "t5"},
}


COMFYUI, KOHYAS, A1111 = (("ComfyUI", "0.38"), ("sd-scripts", "0.9.1"), ("A1111", "1.10"))


def client(tool, *outcome, **more):
    return pytest.mark.client(tool[0], *outcome, rule=tool[1], **more)


@client(COMFYUI)
@pytest.mark.parametrize("kind", PIPELINES)
def test_comfyui_finds_every_name_and_adds_the_same(kind, tmp_path):
    like, file = PIPELINES[kind], tmp_path / "a.safetensors"
    pipe = adapted(pipeline(**like))
    save_pipeline(pipe, file, format="kohya")
    tensors, ours = load_file(file), own_changes(pipe, like)
    found = dict.fromkeys(like, 0)
    for name in {key.partition(".")[0] for key in tensors}:
        component = "text_encoder" if name.startswith(("lora_te_", "lora_te1_")) else (
            "text_encoder_2" if name.startswith("lora_te") else next(iter(like)))  # fmt: skip
        if like[component] == "t5":  # comfy/lora.py: t5xxl's own names behind lora_te3
            known = {f"lora_te3_{p.replace('.', '_')}": [p] for p in weights(build("t5"))}
        else:
            known = known_names(like[component])
        if kind == "SD 1.5":  # ComfyUI knows both there, kohya's scripts and A1111 this one
            known = {key.replace("lora_te1_", "lora_te_"): paths for key, paths in known.items()}
        down, up = (tensors[f"{name}.lora_{x}.weight"] for x in ("down", "up"))
        whole = update(down, up, tensors[f"{name}.alpha"].item())
        if name == "lora_unet_final_layer_adaLN_modulation_1":
            whole = torch.cat(whole.chunk(2)[::-1])
        sizes = [ours[component][path].shape[0] for path in known[name]]
        for path, change in zip(known[name], whole.split(sizes), strict=True):
            mine = ours[component][path]
            torch.testing.assert_close(change.reshape(mine.shape), mine)
            found[component] += 1
    assert found == {name: len(own) for name, own in ours.items()}
    back = pipeline(**like)
    load_pipeline(back, file)
    for name, model in back.components.items():
        one, other = lora_state_dict(model), lora_state_dict(pipe.components[name])
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_names_of_the_real_models():
    """The counts that kohya's scripts print, and names that files of SDXL have."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        flux = diffusers.FluxTransformer2DModel()
    layers = {n: None for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)}
    in_attention = [name for name, (slot,) in sai(layers).items() if ".attentions." in slot.path]
    assert len(in_attention) == 722
    assert {"input_blocks.4.1.proj_in", "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
            "middle_block.1.transformer_blocks.9.ff.net.0.proj",
            "output_blocks.5.1.transformer_blocks.1.attn1.to_out.0"} <= {*in_attention}  # fmt: skip
    assert {"output_blocks.2.2.conv", "output_blocks.5.2.conv", "input_blocks.6.0.op",
            "output_blocks.8.0.skip_connection", "label_emb.0.2"} <= sai(
        dict(unet.named_modules())
    ).keys()  # fmt: skip
    names = bfl(dict(flux.named_modules()))
    assert sum("blocks" in name for name in names) == 304


KOHYAS_BLOCKS = {  # classes of networks/lora.py and lora_flux.py, in whose layers all names are
    "SD 1.5": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    "SDXL": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    "Flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
}
KOHYAS_TEXT = ("CLIPAttention", "CLIPMLP", "T5Attention", "T5DenseActDense")


@client(KOHYAS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_kohyas_scripts_have_a_module_for_every_name(kind, tmp_path):
    """They make a module of each layer in these classes, and look for its name in the file."""
    like, pipe = PIPELINES[kind], pipeline(**PIPELINES[kind])
    expected = set()
    for name, model in pipe.components.items():
        classes = KOHYAS_TEXT if "text" in name else KOHYAS_BLOCKS[kind]
        tops = [n for n, m in model.named_modules() if type(m).__name__ in classes]
        inside = {
            n for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
            and any(f"{n}.".startswith(f"{top}.") for top in tops)
        }  # fmt: skip
        inject(model, lambda path, _, inside=inside: path in inside, r=1)
        if like[name] == "t5":  # LORA_PREFIX_TEXT_ENCODER_T5
            expected |= {f"lora_te3_{path.replace('.', '_')}" for path in inside}
            continue
        known = {n: paths for n, paths in known_names(like[name]).items() if inside & {*paths}}
        if kind == "SD 1.5":  # LORA_PREFIX_TEXT_ENCODER, of one encoder
            known = {n.replace("lora_te1_", "lora_te_"): paths for n, paths in known.items()}
        expected |= known.keys()
    save_pipeline(pipe, tmp_path / "a.safetensors", format="kohya")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == expected


def a1111_name(name):
    """A1111's module of SD 1.5 for a name of kohya's (convert_diffusers_name_to_compvis)."""
    side, x, part, i, inside = re.fullmatch(
        r"lora_unet_(down|up)_blocks_(\d)_(attentions|resnets|downsamplers|upsamplers)_(\d)_(.+)",
        name,
    ).groups()
    block = 3 * int(x)
    if part == "downsamplers":
        return f"diffusion_model_input_blocks_{block + 3}_0_op"
    if part == "upsamplers":
        return f"diffusion_model_output_blocks_{block + 2}_{2 if block else 1}_conv"
    n = block + int(i) + (1 if side == "down" else 0)
    if part == "resnets":
        inside = RESNET[inside].replace(".", "_")
    half = {"down": "input", "up": "output"}[side]
    return f"diffusion_model_{half}_blocks_{n}_{int(part == 'attentions')}_{inside}"


@client(A1111)
def test_a1111_finds_the_blocks_of_the_real_sd(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    layers = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    theirs = {f"diffusion_model_{name.replace('.', '_')}" for name in sai(dict.fromkeys(layers))}
    blocks = [n for n in layers if n.startswith(("down_blocks", "up_blocks"))]
    found = {a1111_name(f"lora_unet_{name.replace('.', '_')}") for name in blocks}
    assert found <= theirs
    assert len(found) == len(blocks)


@client(COMFYUI, "otherwise", what="a DoRA: divided by the lengths of the base's rows")
@client(A1111, "otherwise", what="a DoRA: divided by the lengths of columns")
@pytest.mark.client("diffusers", "otherwise", what="a DoRA of kohya's: its lengths are left out")
@PEFT_WARNS
def test_a_dora_is_read_otherwise_and_said(tmp_path):
    pipe, file = pipeline(unet="sd"), tmp_path / "a.safetensors"
    model = pipe.components["unet"]
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    inject(model, path, r=2, variant="dora")
    torch.nn.init.normal_(model.get_submodule(path).lora_B)
    with pytest.warns(LoRAInjectWarning, match=r"DoRA of rows .*ComfyUI .*A1111 .*diffusers"):
        save_pipeline(pipe, file, format="kohya")
    own = {key.partition(".")[2]: t for key, t in load_file(file).items()}
    W, scale = weights(build("sd"))[path], own["dora_scale"]
    V = W + update(own["lora_down.weight"], own["lora_up.weight"], own["alpha"].item())
    ours = W + changes(build("sd"), copy.deepcopy(model))[path]
    torch.testing.assert_close(V * scale / V.norm(dim=1, keepdim=True), ours)  # LyCORIS
    assert not torch.allclose(V * scale / W.norm(dim=1, keepdim=True), ours, rtol=0.01)
    assert not torch.allclose(V * scale / V.norm(dim=0, keepdim=True), ours, rtol=0.01)
    theirs = diffusers_pipeline("SD 1.5")
    theirs.load_lora_weights(str(file))
    layer = theirs.unet.get_submodule(path)
    torch.testing.assert_close(W + layer.get_delta_weight("default_0"), V)


@PEFT_WARNS
@pytest.mark.client("diffusers")
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["SD 1.5", "SDXL"])
def test_diffusers_reads_them_as_we_do(kind, format, tmp_path):
    like = PIPELINES[kind]
    pipe = adapted(pipeline(**like))
    path = tmp_path / ("a.safetensors" if format == "kohya" else "a")
    save_pipeline(pipe, path, format=format)
    theirs = diffusers_pipeline(kind)
    theirs.load_lora_weights(path if format == "diffusers" else str(path))
    again = diffusers_pipeline(kind)
    load_pipeline(again, path)
    for name, own in own_changes(pipe, like).items():
        mine = lora_state_dict(getattr(again, name)), lora_state_dict(pipe.components[name])
        assert all(torch.equal(mine[0][key], value) for key, value in mine[1].items())
        deltas = {
            layer: module.get_delta_weight("default_0")
            for layer, module in getattr(theirs, name).named_modules()
            if hasattr(module, "get_delta_weight")
        }
        assert deltas.keys() == own.keys()
        for layer, delta in deltas.items():
            torch.testing.assert_close(delta, own[layer])


def diffusers_pipeline(kind):
    diffusers = pytest.importorskip("diffusers")
    like = {name: build(model) for name, model in PIPELINES[kind].items()}
    rest = {"vae": None, "tokenizer": None, "scheduler": None}
    if kind == "SDXL":
        return diffusers.StableDiffusionXLPipeline(**like, **rest, tokenizer_2=None)
    return diffusers.StableDiffusionPipeline(
        **like, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@PEFT_WARNS
@pytest.mark.client("diffusers")
def test_what_diffusers_saves_is_read_component_by_component(tmp_path):
    import peft

    theirs = diffusers_pipeline("SDXL")
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj"],
                             rank_pattern={"encoder.layers.1.self_attn.q_proj": 4},
                             alpha_pattern={"encoder.layers.1.self_attn.q_proj": 2})  # fmt: skip
    theirs.unet.add_adapter(peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["to_k"]))
    for encoder in (theirs.text_encoder, theirs.text_encoder_2):
        peft.inject_adapter_in_model(config, encoder)  # transformers' own way needs its newest
    state = {name: peft.get_peft_model_state_dict(getattr(theirs, name), adapter_name="default")
             for name in PIPELINES["SDXL"]}  # fmt: skip
    said = {name: getattr(theirs, name).peft_config["default"].to_dict() for name in state}
    theirs.save_lora_weights(
        tmp_path, unet_lora_layers=state["unet"], text_encoder_lora_layers=state["text_encoder"],
        text_encoder_2_lora_layers=state["text_encoder_2"],
        unet_lora_adapter_metadata=said["unet"],
        text_encoder_lora_adapter_metadata=said["text_encoder"],
        text_encoder_2_lora_adapter_metadata=said["text_encoder_2"],
    )  # fmt: skip
    ours = pipeline(**PIPELINES["SDXL"])
    load_pipeline(ours, tmp_path)
    for name, own in own_changes(ours, PIPELINES["SDXL"]).items():
        for layer, module in getattr(theirs, name).named_modules():
            if hasattr(module, "get_delta_weight"):
                torch.testing.assert_close(own.pop(layer), module.get_delta_weight("default"))
        assert not own


@PEFT_WARNS
@pytest.mark.client("diffusers")
@pytest.mark.parametrize("style", ["kohya", "bfl"])
def test_diffusers_divides_flux_as_we_do(style, tmp_path):
    """Its conversion knows the sizes of the real Flux alone: one block of each, without weights."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    from lora_inject.files.formats import kohya

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    layers = {f"lora_unet_double_blocks_0_{side}_attn_qkv": (3072, 9216) for side in ("img", "txt")}
    layers |= {"lora_unet_single_blocks_0_linear1": (3072, 21504),
               "lora_unet_single_blocks_0_linear2": (15360, 3072),
               "lora_unet_final_layer_adaLN_modulation_1": (3072, 6144)}  # fmt: skip
    tensors = {}
    for name, (n_in, n_out) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, n_in)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, 2)
        if "final" not in name:  # of which diffusers drops alpha
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    if style == "bfl":  # ComfyUI's
        tensors = {key.replace("lora_unet_double_blocks_0_", "diffusion_model.double_blocks.0.")
                   .replace("attn_qkv", "attn.qkv")
                   : t for key, t in tensors.items() if "double" in key}  # fmt: skip
        ours = kohya.from_tensors(tensors, {}, tmp_path, Index(model), None)
        dotted = {key.replace("attn.qkv", "attn_qkv").replace("blocks.0.", "blocks_0_"): t
                  for key, t in tensors.items()}  # fmt: skip
        theirs = _convert_kohya_flux_lora_to_diffusers(dotted)
    else:
        ours = kohya.from_tensors(tensors, {}, tmp_path, Index(model), None)
        theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    deltas = {}
    for key, A in theirs.items():
        name, _, rest = key.removeprefix("transformer.").partition(".lora_")
        if rest == "A.weight":
            deltas[name] = theirs[key.replace("lora_A", "lora_B")] @ A
    assert {pair.path for pair in ours.pairs} == deltas.keys()
    for pair in ours.pairs:
        torch.testing.assert_close(pair.scaling * pair.B @ pair.A, deltas[pair.path])


def test_unequal_ranks_and_scalings_of_what_is_fused(tmp_path):
    model, file = build("flux"), tmp_path / "a.safetensors"
    attention = model.transformer_blocks[0].attn
    ranks = {"transformer_blocks.0.attn.to_q": {"r": 2, "alpha": 6},
             "transformer_blocks.0.attn.to_v": {"r": 3, "alpha": 1}}  # fmt: skip
    inject(model, {**ranks, "single_transformer_blocks.0.proj_mlp": {"r": 1}, "x_embedder": {}})
    torch.nn.init.normal_(attention.to_q.lora_B)  # and v has not been trained yet
    torch.nn.init.normal_(model.single_transformer_blocks[0].proj_mlp.lora_B)
    save(model, file, format="kohya")
    tensors = load_file(file)
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    assert up.shape == (48, 5)
    assert not up[16:].any()
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (112, 1)
    back = load(build("flux"), file)
    assert lora_state_dict(back).keys() == lora_state_dict(model).keys()
    assert back.transformer_blocks[0].attn.to_v.lora_A.shape == (3, 16)
    with safe_open(file, "pt") as opened:  # another tool makes other factors, and copies the rest
        metadata = {k: v for k, v in opened.metadata().items() if "digests" not in k}
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = torch.randn(48, 5)
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    dense = load(build("flux"), tmp_path / "b.safetensors")
    assert dense.transformer_blocks[0].attn.to_k.lora_A.shape == (5, 16)
    load(model, file)  # into the adapter that is there
    one, other = (changes(build("flux"), m) for m in (back, model))
    assert one.keys() == other.keys()
    for path, change in one.items():
        torch.testing.assert_close(change, other[path])


@client(COMFYUI)
@client(KOHYAS, "otherwise", what="a LoKr of one part of a fused layer: it has no such name")
def test_what_cannot_be_fused_is_written_by_parts_and_said(tmp_path):
    model, file = build("flux"), tmp_path / "a.safetensors"
    inject(model, ["transformer_blocks.0.attn.to_q", "x_embedder"], r=2, variant="lokr")
    inject(model, "transformer_blocks.0.attn.to_q", r=2, variant="dora", adapter="d")
    with pytest.warns(LoRAInjectWarning, match=r"1 layer such as transformer_blocks\.0\.attn\.to_q"
                      ".*LyCORIS's names, which ComfyUI reads"):  # fmt: skip
        save(model, file, format="kohya", adapter="default")
    names = {key.partition(".")[0] for key in load_file(file)}
    assert names == {"lycoris_transformer_blocks_0_attn_to_q", "lora_unet_img_in"}
    load(build("flux"), file)
    with pytest.warns(LoRAInjectWarning) as said:  # k has lengths too, which are not known
        save(model, file, format="kohya", adapter="d")
    told = " ".join(str(warning.message) for warning in said)
    assert "written by LyCORIS's names" in told
    assert "LyCORIS alone computes a DoRA of rows as it was trained" in told
    layers = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    inject(model, layers, r=2, variant="dora", adapter="all")
    with pytest.warns(LoRAInjectWarning, match="A1111"):
        save(model, file, format="kohya", adapter="all")
    state = load_file(file)
    assert state["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"].shape == (48, 1)
    back = load(build("flux"), file, adapter="all")
    one, other = lora_state_dict(model, adapter="all"), lora_state_dict(back)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["clip", "clip_with_projection"])
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_text_encoder_alone_has_the_level_that_tools_know(name, format, tmp_path):
    model = build(name)
    inject(model, {"q_proj": {"r": 2}, "layers.1.self_attn.v_proj": {"r": 3, "alpha": 1}},
           bias="lora_only")  # fmt: skip
    if format == "kohya":
        model = build(name)
        inject(model, ["q_proj"], r=2)
    torch.nn.init.normal_(model.get_submodule(
        next(n for n, _ in model.named_modules() if n.endswith("q_proj"))).lora_B)  # fmt: skip
    path = tmp_path / ("a.safetensors" if format == "kohya" else "a")
    save(model, path, format=format)
    file = path if format == "kohya" else path / "pytorch_lora_weights.safetensors"
    front = {"kohya": {"clip": "lora_te_text_model", "clip_with_projection": "lora_te2_text_model"},
             "diffusers": {"clip": "text_encoder.text_model",
                           "clip_with_projection": "text_encoder_2.text_model"}}  # fmt: skip
    with safe_open(file, "pt") as opened:
        assert all(key.startswith(f"{front[format][name]}") for key in opened.keys())  # noqa: SIM118
    back = load(build(name), path)
    one, other = lora_state_dict(model), lora_state_dict(back)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_names_can_be_looked_up_for_any_model():
    names = ModelNames(Index(torch.nn.Sequential(torch.nn.Linear(2, 2))))
    assert names.place("lycoris_0").slots == names.place("0").slots
    assert names.place("lora_te_0").slots
    assert names.place("x").slots == ()


def test_diffusers_format_still_refuses_what_it_has_no_word_for(tmp_path):
    pipe = adapted(pipeline(unet="sd"), variant="loha")
    with pytest.raises(FormatError, match="diffusers' format"):
        save_pipeline(pipe, tmp_path / "a")
    assert not (tmp_path / "a").exists()
