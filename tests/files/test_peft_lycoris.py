"""PEFT's LoHa and LoKr beside ours, both ways, and what it or another format has no word for."""

import json

import peft
import pytest
import torch
from lycoris_layers import INPUTS, NAMES, close, layers, moved, of_weights
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from stored_models import SAFE, peft_loads
from torch import nn

from lora_inject import FormatError, LoRAInjectWarning, inject, load, save, strip
from lora_inject.core.state import adapters_of
from lora_inject.variants import LoKr
from lora_inject.variants.lokr import divided

pytestmark = pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted")


def test_a_lokr_of_whole_ones_has_alpha_over_r_here_and_in_peft_and_one_in_lycoris(tmp_path):
    model = layers()
    inject(model, "lin", r=4, alpha=8, variant="lokr")
    assert set(dict(model.lin.named_parameters())) == {"weight", "bias", "lora_A", "lora_B"}
    moved(model)
    save(model, tmp_path / "a")
    close(peft_loads(layers(), tmp_path / "a")(INPUTS), model(INPUTS))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["alpha"] == 8
    save(model, tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    w1, w2 = tensors["lycoris_lin.lokr_w1"], tensors["lycoris_lin.lokr_w2"]
    assert tensors["lycoris_lin.alpha"] == 4
    close(model(INPUTS), of_weights(layers(), {"lin": layers().lin.weight + torch.kron(w1, w2)}))
    other = layers()
    load(other, tmp_path / "a.safetensors")
    close(other(INPUTS), model(INPUTS))
    assert adapters_of(other.lin)[0].settings.scaling == 1


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize(
    "variant", ["loha", "lokr", LoKr(both=True), LoKr(factor=2), LoKr(factor=3, both=True)]
)
def test_peft_computes_what_we_save_and_it_comes_back(variant, r, tmp_path):
    model = layers()
    names = NAMES if r == 1 or variant == "loha" else NAMES[:3]  # see the refusal below
    targets = {name: {"alpha": 1 + i} for i, name in enumerate(names)}
    inject(model, targets, r=r, variant=variant)
    fresh = layers()
    assert all(map(torch.equal, model(INPUTS), fresh(INPUTS)))
    moved(model)
    save(model, tmp_path / "a")
    close(peft_loads(layers(), tmp_path / "a")(INPUTS), model(INPUTS))
    load(fresh, tmp_path / "a")
    assert all(map(torch.equal, model(INPUTS), fresh(INPUTS)))
    assert {a.settings.alpha for a in adapters_of(fresh.one)} == {3}
    load(model, tmp_path / "a")
    assert all(map(torch.equal, model(INPUTS), fresh(INPUTS)))
    strip(model)
    assert all(map(torch.equal, model(INPUTS), layers()(INPUTS)))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, alpha=3),
        peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
        peft.LoHaConfig(r=2, alpha=3, rank_pattern={"conv": 3}, alpha_pattern={"one": 5}),
        peft.LoKrConfig(r=1, alpha=3),
        peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
        peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=3),
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=4, rank_pattern={"lin": 7}),
        peft.LoKrConfig(r=1, alpha=3, decompose_factor=5),
    ],
    ids=range(8),
)
def test_peft_directories_load_exactly_and_are_written_as_they_were(config, tmp_path):
    cored_lokr = config.peft_type == "LOKR" and config.use_effective_conv2d
    config.target_modules = NAMES[:3] if cored_lokr else NAMES  # see the refusal below
    theirs = moved(peft.get_peft_model(layers(), config).eval())
    theirs.save_pretrained(tmp_path / "a")
    model = layers()
    load(model, tmp_path / "a")
    close(model(INPUTS), theirs(INPUTS))
    save(model, tmp_path / "b")
    first, second = (load_file(tmp_path / d / SAFE) for d in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    close(peft_loads(layers(), tmp_path / "b")(INPUTS), theirs(INPUTS))
    strip(model)
    assert all(map(torch.equal, model(INPUTS), layers()(INPUTS)))


def test_dropout_of_ranks_is_left_out_with_a_warning(tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["lin"], rank_dropout=0.5)
    peft.get_peft_model(layers(), config).save_pretrained(tmp_path / "a")
    with pytest.warns(LoRAInjectWarning, match=r"rank_dropout=0.5 acts in training alone"):
        load(layers(), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, "gives lin the rank 3, and its tensors have 2"),
        ({"alpha": "x"}, "no number"),
        ({"peft_type": "LOKR"}, "lin is a loha, and its config one of lokr"),
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"modules_to_save": ["one"]}, "modules_to_save beside a loha"),
    ],
)
def test_a_config_that_is_not_of_the_tensors_is_refused(change, message, tmp_path):
    config = peft.LoHaConfig(r=2, target_modules=["lin"])
    peft.get_peft_model(layers(), config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FormatError, match=message):
        load(layers(), tmp_path / "a")


def test_peft_orders_a_whole_w2_of_one_kernel_dimension_otherwise_and_is_refused(tmp_path):
    config = peft.LoKrConfig(r=4, alpha=4, target_modules=["line"])
    theirs = moved(peft.get_peft_model(layers(), config).eval())
    layer = theirs.base_model.model.line
    w1, w2 = (layer.__getattr__(f"lokr_w{n}")["default"] for n in (1, 2))
    kernel = torch.kron(w1[..., None], w2)  # which is what LyCORIS computes
    assert not torch.allclose(layer.get_delta_weight("default"), kernel)
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"line: PEFT's Kronecker.*kohya's format"):
        load(layers(), tmp_path / "a")
    model = layers()
    inject(model, "line", r=4, variant="lokr")
    with pytest.raises(FormatError, match=r"line: PEFT's Kronecker"):
        save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    config = peft.LoKrConfig(r=1, target_modules=["line"], use_effective_conv2d=True)
    theirs = peft.get_peft_model(layers(), config)
    with pytest.raises(RuntimeError, match="view size"):
        theirs(INPUTS)
    theirs.save_pretrained(tmp_path / "c")
    with pytest.raises(FormatError, match=r"line: PEFT's Kronecker"):
        load(layers(), tmp_path / "c")


def test_what_peft_or_a_format_has_no_word_for_is_refused(tmp_path):
    model = layers()
    inject(model, "lin", r=2, variant="loha")
    for arguments in ({"format": "loralib"}, {"format": "diffusers"}):
        with pytest.raises(FormatError, match=r"lin is a loha.*\"peft\" or \"kohya\""):
            save(model, tmp_path / "a", **arguments)
    inject(model, {"one": {"variant": "lokr"}}, r=2)
    with pytest.raises(FormatError, match=r"one variant for all layers.*loha.*lokr"):
        save(model, tmp_path / "a")
    save(model, tmp_path / "a.safetensors", format="kohya")
    other = layers()
    load(other, tmp_path / "a.safetensors")
    close(other(INPUTS), model(INPUTS))
    strip(model)
    inject(model, "conv", r=2, variant="tucker")
    with pytest.raises(FormatError, match="PEFT has no tucker"):
        save(model, tmp_path / "a")
    strip(model)
    inject(model, {"lin": {"variant": LoKr(factor=2)}, "one": {"variant": LoKr(factor=3)}}, r=1)
    with pytest.raises(FormatError, match=r"divide lin, one otherwise.*kohya"):
        save(model, tmp_path / "a")
    strip(model)
    biased = layers()
    inject(biased, "lin", r=2, variant="loha", bias="lora_only")
    with pytest.raises(FormatError, match=r"factors alone, and lin.bias"):
        save(biased, tmp_path / "a")
    table = nn.ModuleDict({"table": nn.Embedding(7, 4)})
    inject(table, "table", r=2, variant="loha")
    with pytest.raises(FormatError, match=r"table is of a kind for which PEFT has no loha"):
        save(table, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("variant", ["loha", "tucker"])
def test_a_product_of_low_rank_is_portable_exactly(variant, tmp_path):
    model, names = layers(), ["one", "line"] if variant == "tucker" else ["lin", "one", "line"]
    inject(model, names, r=2, alpha=3, variant=variant)
    moved(model)
    shown = save(model, tmp_path / "a", portable=True)
    assert {w.r for w in shown.weights} == {4 if variant == "loha" else 2}
    assert shown.worst == 0
    close(peft_loads(layers(), tmp_path / "a")(INPUTS), model(INPUTS))
    shown = save(model, tmp_path / "a", portable=True, r=1, error=0.99)
    assert 0.01 < shown.worst < 0.99


def test_a_kronecker_product_is_portable_with_its_error(tmp_path):
    model = layers()
    inject(model, "lin", r=2, variant="lokr")
    moved(model)
    with pytest.raises(FormatError, match=r"lin is a lokr, which is no product of low rank.*r=16"):
        save(model, tmp_path / "a", portable=True)
    assert save(model, tmp_path / "a", portable=True, r=12).worst < 1e-5
    close(peft_loads(layers(), tmp_path / "a")(INPUTS), model(INPUTS))


def test_weights_are_divided_as_peft_divides_them():
    for size in range(1, 200):
        for factor in (-1, *range(1, 20)):
            assert divided(size, factor) == factorization(size, factor), (size, factor)
