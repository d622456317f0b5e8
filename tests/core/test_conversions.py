"""torchao converts layers between ``inject`` and ``strip``: for QAT, for float8, and in place."""

import copy

import pytest
import torch
from helpers import randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    LoRAInjectError,
    LoRAInjectWarning,
    LoRALayer,
    inject,
    load,
    lora_parameters,
    report,
    save,
    strip,
)

quantization = pytest.importorskip("torchao.quantization")
qat = pytest.importorskip("torchao.quantization.qat")
float8 = pytest.importorskip("torchao.float8")
granularity = pytest.importorskip("torchao.quantization.granularity")
pytestmark = [
    pytest.mark.cpu("torchao's QAT on the CPU"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]


def int4():
    group = granularity.PerGroup(8)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)


def only(model):
    """Leaves adapted layers alone, which is the remedy."""
    return lambda module, *_: isinstance(module, nn.Linear) and not isinstance(module, LoRALayer)


def prepare(model, wanted=None):
    quantization.quantize_(model, qat.QATConfig(int4(), step="prepare"), wanted)


def finish(model):
    quantization.quantize_(model, qat.QATConfig(int4(), step="convert"))


def train_in_float8(model, wanted=None):
    float8.convert_to_float8_training(model, module_filter_fn=wanted)


REPLACING = [prepare, train_in_float8]
IN_PLACE = [quantization.Int8WeightOnlyConfig, quantization.Float8WeightOnlyConfig]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))


def adapted(**options):
    model = make()
    inject(model, ["0", "2"], r=2, **options)
    randomize_adapters(model)
    return model


X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("convert", REPLACING)
def test_layers_that_a_conversion_replaces_are_told_and_their_adapter_is_not_saved(
    convert, tmp_path
):
    model = adapted()
    bases = [model[i]._parameters["weight"] for i in (0, 2)]
    convert(model)
    assert any(note.startswith("0, 2 had something of an adapter") for note in report(model).notes)
    with pytest.raises(LoRAInjectError, match="no adapters any more: 0, 2 were replaced"):
        save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.warns(LoRAInjectWarning, match="0, 2 had something of an adapter"):
        strip(model)
    for i, base in zip((0, 2), bases, strict=True):
        weight = model[i]._parameters["weight"]
        assert torch.equal(weight, base)
        assert weight.requires_grad  # as before inject
    assert not any(name.startswith("lora_") for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("convert", REPLACING)
def test_one_layer_of_several_that_is_replaced_is_named(convert, tmp_path):
    model = adapted()
    convert(model, lambda module, path: path == "2")
    with pytest.raises(LoRAInjectError, match=r"^2 had something of an adapter and were replaced"):
        save(model, tmp_path)


@pytest.mark.parametrize("convert", REPLACING)
def test_a_conversion_that_leaves_adapted_layers_alone_goes_with_them(convert, tmp_path):
    model = adapted()
    y = model[:3](X)
    convert(model, only(model))
    assert type(model[3]) is not nn.Linear
    assert torch.equal(model[:3](X), y)
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    save(model, tmp_path)
    strip(model)
    assert [type(model[i]) for i in (0, 2)] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("convert", REPLACING)
def test_injecting_after_a_conversion_is_exact_and_stripped_bit_for_bit(convert):
    model = make()
    convert(model)
    y, before = model(X), snapshot(model)  # what fakes quantization sets itself up at first
    inject(model, ["0", "2"], r=2)
    assert torch.equal(model(X), y)
    model(X).square().mean().backward()
    assert all(model[i].lora_B.grad.any() for i in (0, 2))
    strip(model)
    model.zero_grad()
    assert snapshot(model) == before


def test_after_the_end_of_qat_the_adapter_fits_again(tmp_path):
    """Save before, convert, and load into what came of it."""
    model = adapted()
    save(model, tmp_path)
    expected = copy.deepcopy(model)
    strip(model)
    prepare(model)
    finish(model)
    load(model, tmp_path, other_base=True)
    delta = model(X) - strip(copy.deepcopy(model))(X)
    wanted = expected(X) - strip(expected)(X)
    torch.testing.assert_close(delta, wanted, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("config", IN_PLACE)
def test_weights_that_are_quantized_in_place_stay_under_their_adapters(config, tmp_path):
    model = adapted()
    wanted = [i for i in range(4) if isinstance(model[i], nn.Linear)]
    quantization.quantize_(model, config())
    assert all(type(model[i]._parameters["weight"]) is not nn.Parameter for i in wanted)
    plain = strip(copy.deepcopy(model))
    layer = model[0]
    own = X @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(X), plain[0](X) + own)
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    save(model, tmp_path)
    strip(model)
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize(
    "convert", [*REPLACING, lambda m: quantization.quantize_(m, IN_PLACE[0]())]
)
def test_where_an_adapter_acts_in_the_weight_a_conversion_is_refused(convert):
    model = adapted(how="weight")
    before, y = [type(m) for m in model], model(X)
    with pytest.raises(LoRAInjectError, match=r"^0: .*in which an adapter acts"):
        convert(model)
    assert [type(m) for m in model] == before
    assert torch.equal(model(X), y)
