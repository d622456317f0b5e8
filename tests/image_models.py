"""Small models of image pipelines, files as the tools write them, and what these make of them."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from lora_inject import load, strip


def _unet(**more):
    return pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=12, **more,
    ).eval()  # fmt: skip


def sd():
    """A UNet as Stable Diffusion 1.5 has it, whose projections are convolutions."""
    return _unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def sdxl():
    """A UNet as SDXL has it, whose projections are Linear layers."""
    return _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=20,
    )  # fmt: skip


def flux():
    return (
        pytest.importorskip("diffusers")
        .FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        )
        .eval()
    )  # fmt: skip


def _clip(hidden, cls):
    config = tf.CLIPTextConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=2, vocab_size=40,
        num_hidden_layers=2, max_position_embeddings=10, projection_dim=8, eos_token_id=1,
    )  # fmt: skip
    return cls(config).eval()


def clip():
    """Stable Diffusion's text encoder, and the first one of SDXL and Flux."""
    return _clip(12, tf.CLIPTextModel)


def clip_with_projection():
    """SDXL's second text encoder."""
    return _clip(16, tf.CLIPTextModelWithProjection)


def t5():
    config = tf.T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=40)
    return tf.T5EncoderModel(config).eval()


MODELS = {
    f.__name__: f for f in (sd, sdxl, flux, clip, clip_with_projection, t5)
}  # by the names that the cases have


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def pipeline(**names):
    """A pipeline for us: its models by what they are in it."""
    return SimpleNamespace(components={name: build(model) for name, model in names.items()})


def weights(model):
    return {
        name.removesuffix(".weight"): p.detach().clone()
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.dim() > 1 and "lora" not in name
    }


def changes(base, model):
    """What an adapted model adds to the weights of its base, where that is not zero."""
    before, after = weights(base), weights(strip(model, merge=True))
    found = {name: after[name] - W for name, W in before.items()}
    return {name: change for name, change in found.items() if change.any()}


def random_layer(model, paths, r=2, conv=None):
    """(down, up) for one name of a tool's, which stands for these modules of ours."""
    layers = [model.get_submodule(path) for path in paths]
    shape = layers[0].weight.shape
    rows, kernel = sum(layer.weight.shape[0] for layer in layers), tuple(shape[2:])
    ones = (1,) * len(kernel)
    if conv is False:  # as a Linear layer's, whatever it is here
        return torch.randn(r, shape[1:].numel()), torch.randn(rows, r)
    if conv:
        kernel, ones = (1, 1), (1, 1)
    return torch.randn(r, shape[1], *kernel), torch.randn(rows, r, *ones)


def update(down, up, alpha):
    """ComfyUI's, A1111's and kohya's update of a weight (comfy/weight_adapter/lora.py,
    network_lora.py, networks/lora.py): alpha / rank times up times down, both flat."""
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * (up.flatten(1).double() @ down.flatten(1).double()).float()


def require_changes(model_name, file, expected, **options):
    """Load a file, and compare what it adds to each weight with what the tool adds."""
    base, model = build(model_name), build(model_name)
    load(model, file, **options)
    found = changes(base, model)
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        torch.testing.assert_close(found[path], change.reshape(found[path].shape))


def save_tensors(tensors, path):
    save_file({key: torch.as_tensor(t).contiguous().clone() for key, t in tensors.items()}, path)
