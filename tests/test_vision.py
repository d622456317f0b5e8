"""Vision models as timm, torchvision and diffusers build them: they train and come back."""

import pytest
import torch
from families import unet
from helpers import changed_parts, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.nn import functional as F

from lora_inject import disabled, inject, lora_parameters, merged, strip

pytestmark = pytest.mark.usefixtures("device")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, n_in, width, stride):
        super().__init__()
        n_out = 2 * width
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(n_out))

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        h += x if self.downsample is None else self.downsample(x)
        return self.relu(h)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(8, 4, 1), Bottleneck(8, 4, 1))
        self.layer2 = nn.Sequential(Bottleneck(8, 8, 2), Bottleneck(16, 8, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


class Attention(nn.Module):
    """One fused projection for queries, keys and values."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        rows, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim) * 0.02)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def dit():
    model = pytest.importorskip("diffusers").DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        norm_num_groups=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model.eval()


def flux():
    return pytest.importorskip("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def image():
    return {"x": torch.randn(4, 3, 16, 16)}


def noisy(**extra):
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), **extra}


MODELS = {
    "resnet": (ResNet, image, {"targets": nn.Conv2d, "train_also": "fc"}, 14),
    "vit": (VisionTransformer, image, {"targets": ["qkv", "proj", "*mlp.*"]}, 8),
    "vit, parts": (
        VisionTransformer, image, {"targets": "qkv", "parts": {"qkv": ("q", None, "v")}}, 2,
    ),
    "unet": (
        unet,
        lambda: {
            "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 3, 8),
        },
        {"targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]}, None,
    ),
    "dit": (
        dit, lambda: noisy(class_labels=torch.tensor([1, 2])),
        {"targets": ["to_q", "to_v", "*.ff.net.*"]}, 8,
    ),
    "flux": (
        flux,
        lambda: {
            "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 3, 8),
            "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3),
        },
        {"targets": ["to_q", "to_k", "add_q_proj", "proj_mlp"]}, 6,
    ),
}  # fmt: skip


def first(model, inputs):
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.filterwarnings("ignore")  # of diffusers' own imports
@pytest.mark.parametrize("name", MODELS)
def test_it_takes_training_steps_and_comes_back_bit_for_bit(name):
    build, make, settings, layers = MODELS[name]
    model, inputs = build(), make()
    with torch.no_grad():  # diffusers and ResNets start parts at zero, behind which nothing trains
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    base = first(model, inputs).detach()  # which moves the statistics of a ResNet
    before = snapshot(model)
    shown = inject(model, r=2, **settings)
    assert layers is None or sum(row.layers for row in shown.patterns) == layers
    assert torch.equal(first(model, inputs), base)
    start = train_steps(model, inputs, steps=1)
    assert all(p.grad is not None for p in lora_parameters(model))
    assert train_steps(model, inputs, steps=8) < start
    assert not torch.equal(first(model, inputs), base)
    with disabled(model):
        assert torch.equal(first(model, inputs), base)
    on = first(model, inputs)
    with merged(model):
        torch.testing.assert_close(first(model, inputs), on, rtol=1e-3, atol=1e-4)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_the_statistics_of_a_resnet_stand_still_and_its_branch_is_in_front_of_them():
    model, x = ResNet().train(), image()["x"]
    model(x)
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    inject(model, nn.Conv2d, r=2)
    randomize_adapters(model)
    train_steps(model, x)
    state = model.state_dict()
    assert [k for k, v in statistics.items() if not torch.equal(state[k], v)] == []
