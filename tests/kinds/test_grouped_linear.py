"""A Linear by groups of its outputs: A reads the input of each, and B writes as the weight does."""

import copy

import pytest
import torch
from helpers import randomize_adapters
from torch import nn
from torch.nn import functional as F
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4GroupedLinear,
)

from lora_inject import inject, load, merge, per_row, plan, save, strip, unmerge, use

pytestmark = pytest.mark.usefixtures("device")

G, IN, OUT = 3, 8, 12


def layer(dtype=torch.float32):
    return nn.Sequential(DeepseekV4GroupedLinear(IN, OUT, G)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_the_weight_with_b_a_computes_and_is_not_made(dtype, monkeypatch):
    model, x = layer(dtype), torch.randn(2, 5, G, IN).to(dtype)
    base = model(x)
    inject(model, r=2, alpha=3)
    assert torch.equal(model(x), base)
    assert model[0].lora_A.shape == (2, IN)
    assert model[0].lora_B.shape == (OUT, 2)
    randomize_adapters(model, 0.3)
    W = model[0].weight.double() + 1.5 * (model[0].lora_B @ model[0].lora_A).double()
    expected = torch.einsum("ntgi,goi->ntgo", x.double(), W.view(G, -1, IN))
    y = model(x)
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
    y.float().pow(2).sum().backward()
    for one, other in zip(
        torch.autograd.grad(expected.pow(2).sum(), [model[0].lora_A, model[0].lora_B]),
        [model[0].lora_A.grad, model[0].lora_B.grad],
        strict=True,
    ):
        assert (one - other).norm() < 0.02 * one.norm()


def test_what_is_no_grouped_product_by_rows_of_the_weight_is_left_to_the_other_kinds():
    class Elsewhere(nn.Linear):
        """Groups of rows of the weight that another order of outputs has."""

        n_groups = 2

        def __init__(self):
            super().__init__(IN, OUT)
            self.n_groups = 2

        def forward(self, x):
            W = self.weight.view(-1, 2, IN)
            return torch.einsum("...gi,ogi->...go", x, W)

    class Says(nn.Linear):
        def __init__(self):
            super().__init__(IN, OUT)
            self.n_groups = 2

    model = nn.ModuleDict({"elsewhere": Elsewhere(), "says": Says(), "grouped": layer()[0]})
    shown = plan(model, r=2)
    kinds = {site.path: site.kind.name for site in shown.sites}
    assert kinds == {"says": "Linear", "grouped": "grouped Linear"}
    assert [skip.path for skip in shown.skipped] == ["elsewhere"]


def test_merged_saved_and_with_an_adapter_for_each_row(tmp_path):
    model, x = layer(), torch.randn(3, 5, G, IN)
    for name in ("a", "b"):
        inject(model, r=2, adapter=name, dropout=0.5)
    model.eval()
    each = {}
    for name in ("a", "b"):
        use(model, name)
        nn.init.normal_(getattr(model[0], f"lora_B_{name}"))
        each[name] = model(x)
        save(model, tmp_path / name, adapter=name)
        merge(model)
        torch.testing.assert_close(model(x), each[name])
        unmerge(model)
        other = strip(copy.deepcopy(model))
        load(other, tmp_path / name)
        torch.testing.assert_close(other.eval()(x), each[name])
    with per_row(model, ["a", None, "b"]):
        rows = model(x)
    torch.testing.assert_close(rows[0], each["a"][0])
    torch.testing.assert_close(rows[2], each["b"][2])
    assert torch.equal(rows[1], strip(model)(x)[1])


def test_dropout_acts_on_the_input_of_each_group():
    model, x = layer(), torch.randn(2, 5, G, IN)
    inject(model, r=2, dropout=0.5)
    randomize_adapters(model, 0.3)
    delta = (
        model.eval()(x) - F.linear(x, x.new_zeros(OUT // G, IN)) - strip(copy.deepcopy(model))(x)
    )
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    seen = model.eval()(dropped) - strip(copy.deepcopy(model))(dropped)
    torch.manual_seed(1)
    trained = model.train()(x) - strip(copy.deepcopy(model))(x)
    torch.testing.assert_close(trained, seen)
    assert not torch.allclose(trained, delta)


def test_all_linear_adapts_the_output_projection_of_deepseek_v4():
    config = DeepseekV4Config(
        hidden_size=32, num_attention_heads=4, head_dim=8, q_lora_rank=8, o_groups=2, o_lora_rank=4,
        num_hidden_layers=1, layer_types=["sliding_attention"],
    )  # fmt: skip
    model = DeepseekV4Attention(config, 0)
    shown = plan(model, r=2)
    assert {"o_a_proj", "o_b_proj", "q_a_proj"} <= {site.path for site in shown.sites}
    assert [site.way for site in shown.sites if site.path == "o_a_proj"] == ["branch"]
