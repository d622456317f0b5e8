"""Parameters that no layer calls: matrices, and the fused experts of real models."""

import copy

import pytest
import torch
from families import mixtral, qwen3_moe
from helpers import changed_parts, paired, randomize_adapters, snapshot, train_steps
from torch import nn

from lora_inject import (
    AlreadyAdaptedError,
    ArgumentError,
    LoRALayer,
    NoMatchError,
    UnsupportedLayerError,
    inject,
    plan,
    strip,
)
from lora_inject.kinds.parameter import ExpertWeights

pytestmark = pytest.mark.usefixtures("device")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def token_ids():
    return {"input_ids": torch.randint(3, 60, (2, 7)), "use_cache": False}


def merged_copy(model):
    """A stripped copy whose weights are W + s B A."""
    plain = strip(copy.deepcopy(model))
    with torch.no_grad():
        for path, layer in model.named_modules():
            for adapter in layer.lora_adapters if isinstance(layer, LoRALayer) else ():
                for spec, (A_name, B_name) in paired(adapter):
                    A, B = layer.get_parameter(A_name), layer.get_parameter(B_name)
                    weight = plain.get_parameter(f"{path}.{spec.weight}")
                    BA = B @ A
                    BA = BA if BA.shape == weight.shape else BA.transpose(-2, -1)
                    weight += adapter.settings.scaling * BA
    return plain


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fused_experts_of_real_models(build, implementation):
    # In float64 where the implementation has it: torch's grouped product does not.
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {}
    model, inputs = build(implementation).to(dtype).eval(), token_ids()
    before, expected = snapshot(model), model(**inputs)[0]
    shown = inject(model, ["q_proj", *EXPERTS], r=2, alpha=6)
    width = 24 if build is mixtral else 12
    experts = 2 * 4 * 2 * ((16 + 2 * width) + (width + 16))
    assert shown.trainable == experts + 2 * 2 * (16 + 16)
    assert torch.equal(model(**inputs)[0], expected)
    layer = model.model.layers[0].mlp.experts
    assert layer.gate_up_proj_lora_A.shape == (4, 2, 16)
    assert layer.gate_up_proj_lora_B.shape == (4, 2 * width, 2)
    randomize_adapters(model, 0.5)
    output = model(**inputs)[0]
    torch.testing.assert_close(output, merged_copy(model)(**inputs)[0], **close)
    assert not torch.equal(output, expected)
    train_steps(model, inputs, steps=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.any(), name
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_gradients_are_the_same_in_every_implementation(build):
    gradients = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        model = build(implementation).eval()
        inject(model, EXPERTS, r=2, seed=0)
        randomize_adapters(model, 0.5)
        torch.manual_seed(1)
        model(**token_ids())[0].pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4)


def test_an_unused_expert_costs_nothing():
    computed = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.is_transposed = False
            self.w = nn.Parameter(torch.randn(5, 3, 4))

        def forward(self, x, expert):
            return x @ self.w[expert].T

    layer = Watched()
    inject(layer, "w", r=2)
    randomize_adapters(layer)
    kind = layer.lora_adapters[0].kind
    update = type(kind).update

    def watching(self, layer, W, spec, A, B):
        computed.append(A.shape)
        return update(self, layer, W, spec, A, B)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(kind), "update", watching)
        layer(torch.randn(2, 4), 3).sum().backward()
        layer(torch.randn(2, 4), torch.tensor(1)).sum().backward()
        assert computed == []  # its forward multiplies by A and B themselves
        layer.w[3], layer.w[torch.tensor(1)], layer.w[torch.tensor([0, 2, 2])]
    assert computed == [(2, 4), (2, 4), (3, 2, 4)]
    used = layer.w_lora_A.grad.flatten(1).any(1)
    assert used.tolist() == [False, True, False, True, False]


def test_expert_weights_behave_like_the_tensor():
    layer = nn.Module()
    layer.w = nn.Parameter(torch.randn(3, 4, 5))
    inject(layer, "w", r=2, layout="out_in")
    randomize_adapters(layer, 0.5)
    whole = layer._parameters["w"] + layer.w_lora_B @ layer.w_lora_A
    assert isinstance(layer.w, ExpertWeights)
    assert (layer.w.shape, layer.w.dtype, len(layer.w)) == (whole.shape, whole.dtype, 3)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(torch.bmm(x, layer.w.transpose(1, 2)), x @ whole.transpose(1, 2))
    torch.testing.assert_close(torch.einsum("eoi,eni->eno", layer.w, x), x @ whole.transpose(1, 2))
    torch.testing.assert_close(torch.stack([layer.w, layer.w])[1], whole)
    torch.testing.assert_close(layer.w[1, 2], whole[1, 2])
    torch.testing.assert_close(layer.w[1:], whole[1:])


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_layout_of_a_fused_weight_is_said_and_not_guessed(layout):
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w = nn.Parameter(torch.randn(3, 4, 6))
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match='layout="out_in"'):
        inject(model, "experts.w")
    assert snapshot(model) == before
    inject(model, {"experts.w": {"layout": layout}}, r=2)
    n_in, n_out = (6, 4) if layout == "out_in" else (4, 6)
    assert model.experts.w_lora_A.shape == (3, 2, n_in)
    assert model.experts.w_lora_B.shape == (3, n_out, 2)
    randomize_adapters(model)
    BA = model.experts.w_lora_B @ model.experts.w_lora_A
    delta = BA if layout == "out_in" else BA.transpose(1, 2)
    torch.testing.assert_close(model.experts.w[0], model.experts._parameters["w"][0] + delta[0])
    with pytest.raises(ArgumentError, match=r"^layout"):
        plan(model, "experts.w", layout="E_out_in")


def test_experts_say_their_layout_themselves():
    for transposed in (False, True):
        owner = nn.Module()
        owner.is_transposed = transposed
        owner.w = nn.Parameter(torch.randn(3, 4, 6))
        inject(owner, "w", r=2)
        assert owner.w_lora_A.shape == (3, 2, 4 if transposed else 6)


def test_all_linear_says_that_it_leaves_fused_experts():
    shown = plan(mixtral(), "all-linear")
    assert len(shown.sites) == 8
    left = {skip.path for skip in shown.skipped if "fused" in skip.reason}
    assert left == {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in EXPERTS}
    assert "fused weight" in inject(mixtral(), "all-linear").notes[0]


def test_a_matrix_is_adapted_as_a_linear_weight():
    model = mixtral().eval()
    inject(model, "gate.weight", r=2)
    gate = model.model.layers[0].mlp.gate
    assert gate.lora_A.shape == (2, 16)
    assert gate.lora_B.shape == (4, 2)
    train_steps(model, token_ids())
    assert gate.lora_B.any()


def test_two_parameters_of_one_module_with_settings_of_their_own():
    model = mixtral()
    before = snapshot(model)
    inject(model, {"experts.gate_up_proj": {"r": 1}, "experts.down_proj": {"r": 3}})
    layer = model.model.layers[1].mlp.experts
    assert layer.gate_up_proj_lora_A.shape[1] == 1
    assert layer.down_proj_lora_A.shape[1] == 3
    assert [a.settings.r for a in layer.lora_adapters] == [1, 3]
    strip(model)
    assert changed_parts(before, snapshot(model)) == []

    inject(model, "experts.gate_up_proj", r=2)
    inject(model, "experts.down_proj", r=2)  # a second call, on the same module
    with pytest.raises(AlreadyAdaptedError):
        inject(model, "experts.down_proj", r=2)
    assert torch.isfinite(torch.tensor(train_steps(model, token_ids())))
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_parameters_that_cannot_be():
    model = nn.Module()
    model.four = nn.Parameter(torch.randn(2, 2, 2, 2))
    model.one = nn.Parameter(torch.randn(2))
    with pytest.raises(UnsupportedLayerError, match="two or three dimensions"):
        inject(model, "four")
    with pytest.raises(NoMatchError, match="'one' matches nothing"):
        inject(model, "one")
    model.counts = nn.Parameter(torch.ones(2, 2).long(), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="quantized or not a parameter"):
        inject(model, "counts")


def test_fused_weights_have_the_operators_of_a_tensor():
    layer = nn.Module()
    layer.w = nn.Parameter(torch.randn(2, 3, 4))
    inject(layer, "w", r=1, layout="out_in")
    randomize_adapters(layer)
    whole = torch.stack([layer.w[0], layer.w[1]])
    for ours, theirs in [
        (layer.w * 2, whole * 2), (2 * layer.w, 2 * whole), (layer.w + 1, whole + 1),
        (1 - layer.w, 1 - whole), (layer.w / 2, whole / 2), (-layer.w, -whole),
        (layer.w**2, whole**2), (layer.w > 0, whole > 0),
    ]:  # fmt: skip
        assert torch.equal(ours, theirs)


def test_biases_of_experts_are_no_matrices_to_adapt():
    experts = nn.Module()
    experts.is_transposed = True
    experts.up_proj = nn.Parameter(torch.randn(2, 4, 6))
    experts.up_proj_bias = nn.Parameter(torch.zeros(2, 6))
    model = nn.ModuleDict({"experts": experts})
    assert [site.path for site in plan(model, "experts.*").sites] == ["experts.up_proj"]
