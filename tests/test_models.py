"""Whole models with unusual parts: scaled embeddings, a UNet, Mamba, normed weights, sharing."""

import copy

import pytest
import torch
import transformers as tf
from families import FAMILIES
from helpers import Net, changed_parts, ids, paired, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.nn.utils import parametrizations

from lora_inject import LoRALayer, UnsupportedLayerError, inject, plan, strip

pytestmark = pytest.mark.usefixtures("device")


def gemma():
    config = tf.Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    return tf.Gemma3ForCausalLM(config).eval()


def test_a_scaled_embedding_scales_the_adapter_as_the_weight():
    model, inputs = gemma(), {"input_ids": torch.randint(3, 60, (2, 7))}
    embed = model.get_input_embeddings()
    assert type(embed).forward is not nn.Embedding.forward
    before, expected = snapshot(model), model(**inputs)[0]
    inject(model, "embed_tokens", r=2)
    assert torch.equal(model(**inputs)[0], expected)
    randomize_adapters(model, 0.5)
    plain = strip(copy.deepcopy(model)).get_input_embeddings()
    with torch.no_grad():
        plain.weight += (embed.lora_B @ embed.lora_A).t()
    x = inputs["input_ids"]
    torch.testing.assert_close(embed(x), plain(x), rtol=1e-5, atol=1e-5)
    train_steps(model, inputs)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_an_embedding_that_shifts_its_ids():
    class Shifted(nn.Embedding):  # as the positions of OPT and BART
        def forward(self, mask):
            return super().forward(mask.cumsum(-1) + 2)

    layer, x = Shifted(12, 4), torch.ones(2, 5, dtype=torch.long)
    inject(layer, nn.Embedding, r=2)
    randomize_adapters(layer)
    expected = (layer.weight + (layer.lora_B @ layer.lora_A).t())[torch.arange(3, 8)]
    torch.testing.assert_close(layer(x)[0], expected)


def test_an_embedding_that_bypasses_its_parent_is_refused_but_for_its_weight():
    class Bypass(nn.Embedding):
        def forward(self, x):
            return nn.functional.embedding(x, self.weight) * 3

    layer, x = Bypass(6, 4), torch.tensor([1, 5])
    with pytest.raises(UnsupportedLayerError, match='how="weight"'):
        inject(layer, nn.Embedding)
    inject(layer, nn.Embedding, r=2, how="weight")
    randomize_adapters(layer)
    full = layer._parameters["weight"] + (layer.lora_B @ layer.lora_A).t()
    torch.testing.assert_close(layer(x), 3 * full[x])


def test_gemma_with_every_linear_layer():
    model, inputs = gemma(), {"input_ids": torch.randint(3, 60, (2, 7))}
    shown = inject(model, "all-linear", r=2)
    assert shown.patterns[0].layers == 2 * 7
    train_steps(model, inputs, steps=2)


def every_adapter_gets_gradients(model, call):
    """Two steps: the first makes B (or A) other than zero, so that both then get gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        output = call()
        target = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
        (output - target).pow(2).sum().backward()
        optimizer.step()
    adapted = [m for m in model.modules() if isinstance(m, LoRALayer)]
    for layer in adapted:
        for adapter in layer.lora_adapters:
            for _, (A_name, B_name) in paired(adapter):
                assert layer.get_parameter(A_name).grad.any(), (layer, A_name)
                assert layer.get_parameter(B_name).grad.any(), (layer, B_name)
    return len(adapted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "qwen3_moe"])
def test_all_linear_gives_every_adapter_gradients(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    before = snapshot(model)
    inject(model, "all-linear", r=2, exclude="pooler" if name == "bert" else ())
    adapted = every_adapter_gets_gradients(model, lambda: model(**inputs)[0])
    assert adapted == family.linears - (name == "bert")  # the pooler is not on the way to output 0
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore")  # of diffusers' own imports
def test_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    sample, time, text = torch.randn(2, 2, 8, 8), torch.tensor([3, 5]), torch.randn(2, 4, 8)

    def call():
        return model(sample, time, text).sample

    before, expected = snapshot(model), call()
    for targets in ("all-linear", ["all-linear", nn.Conv2d]):
        shown = inject(model, targets, r=2)
        assert torch.equal(call(), expected)
        adapted = every_adapter_gets_gradients(model, call)
        assert adapted == sum(row.layers for row in shown.patterns)
        strip(model)
        assert changed_parts(before, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore")  # of Mamba's missing kernels
def test_mamba_whose_scan_reads_weights():
    config = tf.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1)
    model, inputs = tf.MambaForCausalLM(config).eval(), {"input_ids": torch.randint(3, 60, (2, 7))}
    before = snapshot(model)
    ways = {site.path.rpartition(".")[2]: site.way for site in plan(model, "all-linear").sites}
    assert ways == {"in_proj": "branch", "x_proj": "weight", "dt_proj": "weight",
                    "out_proj": "weight"}  # fmt: skip
    inject(model, "all-linear", r=2)
    every_adapter_gets_gradients(model, lambda: model(**inputs)[0])
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def normed(norm):
    if norm == "old weight_norm":
        return nn.utils.weight_norm(nn.Linear(4, 6))
    return getattr(parametrizations, norm)(nn.Linear(4, 6))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "old weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_normed_weights_run_their_own_forward(norm):
    layer = normed(norm)
    model, x = nn.Sequential(layer, nn.Linear(6, 2)), torch.randn(3, 4)
    model.eval()
    names, bytes_before = list(model.state_dict()), snapshot(model)["state"]
    plan(model.train(), "0")
    assert snapshot(model)["state"] == bytes_before  # planning reads no computed weight
    model.eval()
    expected, kind = model(x), type(layer)
    inject(model, "0", r=2)
    assert torch.equal(model(x), expected)
    train_steps(model.train(), x)
    with pytest.raises(UnsupportedLayerError, match="not a parameter of its own"):
        plan(normed(norm), nn.Linear, how="weight")
    strip(model)
    assert type(layer) is kind
    assert list(model.state_dict()) == names
    assert snapshot(model)["state"] == bytes_before


def test_a_module_that_another_object_captured_before():
    class Capturing:
        def __init__(self, layer):
            self.call = layer.forward  # bound to the object, whose class will change
            self.layer = layer

    model, x = Net(), torch.randn(2, 8)
    captured = Capturing(model.layers[0].q_proj)
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    assert torch.equal(captured.layer(x), model.layers[0].q_proj(x))


def test_an_adapter_larger_than_its_layer_draws_a_warning():
    with pytest.warns(UserWarning, match=r"0: 128 against 64") as caught:
        shown = inject(nn.Sequential(nn.Linear(8, 8)), "0", r=8)
    assert len(caught) == 1
    assert "more parameters" in shown.notes[0]
    assert inject(nn.Sequential(nn.Linear(8, 8)), "0", r=2).notes == ()


def test_bilinear_has_no_kind():
    with pytest.raises(ValueError, match="Bilinear, which cannot be adapted"):
        inject(nn.ModuleDict({"mix": nn.Bilinear(4, 4, 4), "up": nn.Linear(4, 4)}), "mix")


def test_tied_embedding_and_head_both_adapted():
    model = Net()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    before, weight = snapshot(model), model.embed.weight.detach().clone()
    inject(model, ["embed", "head"], r=2)
    train_steps(model, ids())
    assert torch.equal(model.embed.weight, weight)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
