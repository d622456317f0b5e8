"""Tools of others that touch an adapted layer: each works, or is refused before it does harm."""

import copy
import io
from types import MethodType

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lora_inject import (
    LoRAInjectError,
    LoRALayer,
    disabled,
    inject,
    lora_parameters,
    merge,
    per_row,
    save,
    strip,
    unmerge,
    use,
)

pytestmark = pytest.mark.usefixtures("device")

EACH_WAY = pytest.mark.parametrize("how", ["auto", "weight"])


def adapted(layer=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6) if layer is None else layer, nn.Tanh())
    inject(model, "0", r=2, **options)
    randomize_adapters(model, 0.5)
    return model


# --- a forward that was kept ----------------------------------------------------------------------


def keep_forward(layer):
    """What hooks of others do: they call the forward that the layer had when they came."""
    kept = layer.forward

    def forward(self, *args, **kwargs):
        return kept(*args, **kwargs)

    layer.forward = MethodType(forward, layer)
    layer.forward.__func__.__wrapped__ = kept


@EACH_WAY
def test_a_kept_forward_runs_what_is_in_use(how):
    model, x = adapted(how=how), torch.randn(3, 6)
    with disabled(model):
        base = model(x)
    with_adapter = model(x)
    keep_forward(model[0])
    with disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), with_adapter)
    use(model)
    assert torch.equal(model(x), base)
    use(model, "default")
    assert torch.equal(model(x), with_adapter)
    merge(model)
    torch.testing.assert_close(model(x), with_adapter)
    unmerge(model)
    with per_row(model, [None] * 3) if how == "auto" else disabled(model):
        torch.testing.assert_close(model(x), base)
    strip(model)
    assert torch.equal(model(x), base)


def test_one_that_was_kept_while_nothing_was_in_use_is_refused_at_use():
    model = adapted()
    use(model)
    keep_forward(model[0])
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"^0: .*would bypass.*del layer\.forward"):
        use(model, "default")
    assert changed_parts(before, snapshot(model)) == []
    del model[0].forward
    use(model, "default")
    assert isinstance(model[0], LoRALayer)


def test_group_offloading_goes_on_under_all_of_them():
    offloading = pytest.importorskip("diffusers.hooks").apply_group_offloading
    model, x, cpu = adapted(), torch.randn(3, 6), torch.device("cpu")
    with_adapter = model(x)
    offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    use(model)
    base = model(x)
    assert not torch.equal(base, with_adapter)
    use(model, "default")
    assert torch.equal(model(x), with_adapter)
    strip(model)
    assert torch.equal(model(x), base)


# --- casts ----------------------------------------------------------------------------------------


@EACH_WAY
def test_beside_a_weight_that_is_stored_in_8_bits_an_adapter_keeps_its_values(how):
    model = adapted(how=how)
    values = [p.detach().clone() for p in lora_parameters(model)]
    for parameter in lora_parameters(model):
        parameter.grad = torch.full_like(parameter, 0.3)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float8_e5m2, torch.float32):
        model.to(dtype)
        assert model[0]._parameters["weight"].dtype is dtype
        for parameter, value in zip(lora_parameters(model), values, strict=True):
            assert torch.equal(parameter, value)
            assert torch.equal(parameter.grad, torch.full_like(value, 0.3))
    model.to(torch.bfloat16)  # which is no matter of storage
    assert {p.dtype for p in lora_parameters(model)} == {torch.bfloat16}


def test_layerwise_casting_trains_the_adapter():
    casting = pytest.importorskip("diffusers.hooks").apply_layerwise_casting
    model, x = adapted(), torch.randn(3, 6)
    casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    values = [p.detach().clone() for p in lora_parameters(model)]
    optimizer = torch.optim.AdamW(lora_parameters(model))
    model(x).sum().backward()
    optimizer.step()
    for parameter, value in zip(lora_parameters(model), values, strict=True):
        assert parameter.dtype is torch.float32
        assert not torch.equal(parameter, value)


def test_what_was_rounded_while_it_was_not_in_use_is_refused_at_use():
    model = adapted()
    use(model)
    model.to(torch.float8_e4m3fn)
    with pytest.raises(LoRAInjectError, match=r"^0: .*cast to 8 bits.*load it again"):
        use(model, "default")
    strip(model)


# --- values ---------------------------------------------------------------------------------------


@EACH_WAY
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_adapter_without_values_does_not_run_beside_an_input_with_some(how, name, device):
    model = adapted(how=how)
    own = model[0]._parameters
    own[name] = nn.Parameter(own[name].detach().to("meta"))
    with pytest.raises(LoRAInjectError, match=r"^0: .*on the meta device.*reset_lora_parameters"):
        model(torch.randn(3, 6))
    model.to("meta")
    assert model(torch.randn(3, 6, device="meta")).is_meta


def test_nor_does_one_of_several_rows():
    model = adapted()
    model[0].lora_A = nn.Parameter(model[0].lora_A.detach().to("meta"))
    model[0].lora_B = nn.Parameter(model[0].lora_B.detach().to("meta"))
    with per_row(model, ["default"]), pytest.raises(LoRAInjectError, match=r"0: .*meta device"):
        model(torch.randn(1, 6))


# --- parametrizations -----------------------------------------------------------------------------

NORMS = pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm]
)


@NORMS
def test_a_norm_is_not_removed_below_an_adapter_that_runs(norm):
    model = adapted(norm(nn.Linear(6, 6))).eval()
    before, y = snapshot(model), model(torch.ones(1, 6))
    with pytest.raises(LoRAInjectError, match=r"^0: .*cannot be removed.*strip"):
        remove_parametrizations(model[0], "weight")
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(torch.ones(1, 6)), y)


@NORMS
def test_a_normed_layer_compiles_in_one_graph(norm):
    model, x = adapted(norm(nn.Linear(6, 6))).eval(), torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@NORMS
def test_one_that_was_removed_while_nothing_was_in_use_does_not_keep_strip(norm, tmp_path):
    model = adapted(norm(nn.Linear(6, 6))).eval()
    save(model, tmp_path / "adapter")
    use(model)
    base = model(torch.ones(1, 6))
    remove_parametrizations(model[0], "weight")
    strip(model)
    assert type(model[0]) is nn.Linear
    assert set(model[0].state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(model(torch.ones(1, 6)), base)


def test_one_that_came_on_top_of_the_adapter_can_go():
    model = adapted()
    y = model(torch.ones(1, 6))
    register_parametrization(model[0], "weight", nn.Identity())
    assert torch.equal(model(torch.ones(1, 6)), y)
    remove_parametrizations(model[0], "weight")
    strip(model)


# --- what reads or makes layers -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripting_says_what_to_do_instead():
    model = adapted()
    for part in (model, model[0]):
        with pytest.raises(LoRAInjectError, match=r"^0: torch\.jit\.script.*strip"):
            torch.jit.script(part)
    torch.jit.script(strip(model, merge=True))


def test_fx_takes_an_adapted_layer_for_a_leaf_as_it_does_its_own_class():
    model, x = adapted(), torch.randn(3, 6)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    assert torch.equal(traced(x), model(x))


def test_gradients_of_each_sample_are_those_of_each_alone():
    model, x = adapted(), torch.randn(3, 6)
    call_for_per_sample_grads(model, batch_size=3)(x).sum().backward()
    found = [parameter.grad_sample for parameter in lora_parameters(model)]
    for row in range(3):
        model.zero_grad()
        model(x[row : row + 1]).sum().backward()
        for parameter, each in zip(lora_parameters(model), found, strict=True):
            torch.testing.assert_close(each[row], parameter.grad)


@EACH_WAY
def test_the_type_of_an_adapted_layer_makes_a_layer_of_its_own_class(how):
    made = type(adapted(how=how)[0])(8, 4, bias=False)
    assert type(made) is nn.Linear
    assert made(torch.ones(8)).shape == (4,)


@EACH_WAY
def test_a_shallow_copy_runs_and_is_stripped_on_its_own(how):
    model, x = adapted(how=how), torch.randn(3, 6)
    twin, y = copy.copy(model[0]), model[0](x)
    assert twin.lora_A is model[0].lora_A
    base = strip(model)[0](x)
    assert torch.equal(twin(x), y)
    strip(twin)
    assert type(twin) is nn.Linear
    assert torch.equal(twin(x), base)
    assert [name for name, _ in twin.named_parameters()] == ["weight", "bias"]


@EACH_WAY
def test_copies_and_pickles_are_as_they_were(how):
    model, x = adapted(how=how), torch.randn(3, 6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(twin[0]) is type(model[0])
        assert torch.equal(twin(x), model(x))


# --- forwards -------------------------------------------------------------------------------------


def test_a_later_patch_of_a_whole_class_is_honoured(monkeypatch):
    model, x = adapted(), torch.randn(3, 6)
    y = model[0](x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight))
    torch.testing.assert_close(model[0](x), y - model[0].bias)


class Gated(nn.Linear):
    def forward(self, gate, x):
        return super().forward(x) * gate


class Named(nn.Linear):
    def forward(self, tokens, times=1.0):
        return super().forward(tokens) * times


def test_the_adapter_reads_x_where_that_is_not_the_first_argument():
    for cls, args in ((Gated, ("gate", "x")), (Named, ("tokens", "times"))):
        torch.manual_seed(0)
        layer = cls(6, 6)
        given = torch.randn(3, 6), torch.randn(3, 6)
        inject(layer, nn.Linear, r=2)
        randomize_adapters(layer)
        other = cls(6, 6)  # the one with the weight that the adapter makes
        with torch.no_grad():
            other.weight.copy_(layer.weight + layer.lora_B @ layer.lora_A)
            other.bias.copy_(layer.bias)
        torch.testing.assert_close(layer(*given), other(*given))
        assert torch.equal(layer(**dict(zip(args, given, strict=True))), layer(*given))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_the_sparse_gradient_of_an_embedding_moves_the_rows_that_were_read(optimizer):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    inject(model, "0", r=2)
    steps = optimizer([model[0].lora_A], lr=0.1)
    for _ in range(2):
        model(torch.tensor([[1, 2, 2]])).pow(2).sum().backward()
        steps.step()
        steps.zero_grad()
    moved = model[0].lora_A.ne(0).all(dim=0)
    assert moved.nonzero().flatten().tolist() == [1, 2]
