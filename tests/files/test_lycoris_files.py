"""Files of LyCORIS and of PEFT's LoHa and LoKr: formulas written out, and both as oracles."""

import json

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file
from stored_models import SAFE, peft_loads
from torch import nn

from lora_inject import FormatError, LoRAInjectError, LoRAInjectWarning, inject, load, save, strip
from lora_inject.core.state import adapters_of
from lora_inject.files.convert import inspect
from lora_inject.variants import LoKr
from lora_inject.variants.lokr import divided

pytestmark = pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted")


class Layers(nn.Module):
    """The layers that LyCORIS knows, one of them grouped."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv = nn.Linear(12, 18), nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.one, self.line = nn.Conv2d(6, 8, 1), nn.Conv1d(6, 8, 3)

    def forward(self, x):
        return [layer(x[name]) for name, layer in self.named_children()]


NAMES = ["lin", "conv", "one", "line"]
INPUTS = {
    "lin": torch.randn(3, 12, generator=torch.Generator().manual_seed(0)),
    "conv": torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)),
    "one": torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(2)),
    "line": torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(3)),
}


def layers():
    torch.manual_seed(0)
    return Layers().eval()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def of_weights(model, changes):
    """What a model computes with other weights, by the name of a layer."""
    values = {f"{name}.weight": weight for name, weight in changes.items()}
    return torch.func.functional_call(model, values, (INPUTS,))


def close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def core(mid, out, into):
    """Tucker's product: out (r, out), mid (r, r, *kernel), into (r, in)."""
    return torch.einsum("ij...,ip,jr->pr...", mid, out, into).contiguous()


# By case: the layer, the tensors of a file and the change of the weight that they are, as scaled.
def _cases():
    a1, b1, a2, b2 = rand(18, 3), rand(3, 12), rand(18, 3) + 1, rand(3, 12) - 1
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    yield "loha", "lin", {**hada, "alpha": 6.0}, 2 * (a1 @ b1) * (a2 @ b2)
    yield "loha without alpha", "lin", hada, (a1 @ b1) * (a2 @ b2)
    yield "loha with alpha 0", "lin", {**hada, "alpha": 0.0}, (a1 @ b1) * (a2 @ b2)
    a1, b1, a2, b2 = rand(12, 2), rand(2, 36), rand(12, 2) + 1, rand(2, 36) - 1
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    yield "loha of a grouped kernel", "conv", {**hada, "alpha": 1.0}, (a1 @ b1) * (a2 @ b2) / 2
    a1, b1, t1 = rand(2, 12), rand(2, 4), rand(2, 2, 3, 3)
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a1 + 1, "hada_w2_b": b1 - 1,
            "hada_t1": t1, "hada_t2": t1 + 1}  # fmt: skip
    change = core(t1, a1, b1) * core(t1 + 1, a1 + 1, b1 - 1)
    yield "loha with cores", "conv", {**hada, "alpha": 4.0}, 2 * change
    w1, w2 = rand(3, 4), rand(6, 3)
    own = {"lokr_w1": w1, "lokr_w2": w2}
    yield "lokr of whole ones", "lin", {**own, "alpha": 5.0}, torch.kron(w1, w2)
    yield "lokr of whole ones, no alpha", "lin", own, torch.kron(w1, w2)
    a, b = rand(6, 2), rand(2, 3)
    own = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": 6.0}
    yield "lokr of a whole and a product", "lin", own, 3 * torch.kron(w1, a @ b)
    c, d = rand(3, 2), rand(2, 4)
    own = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": 1.0}
    yield "lokr of products", "lin", own, torch.kron(c @ d, a @ b) / 2
    own = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": w2, "alpha": 1.0}
    yield "lokr of a product and a whole", "lin", own, torch.kron(c @ d, w2) / 2
    w1, w2 = rand(3, 2), rand(4, 2, 3, 3)
    kernel = torch.kron(w1[..., None, None], w2)
    yield "lokr of a grouped kernel", "conv", {"lokr_w1": w1, "lokr_w2": w2}, kernel
    a, b, t = rand(2, 4), rand(2, 2), rand(2, 2, 3, 3)
    own = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t, "alpha": 6.0}
    kernel = torch.kron(w1[..., None, None], core(t, a, b))
    yield "lokr with a core", "conv", own, 3 * kernel
    w1, w2 = rand(2, 3), rand(4, 2, 3)
    kernel = torch.kron(w1[..., None], w2)
    yield "lokr of a kernel of one dimension", "line", {"lokr_w1": w1, "lokr_w2": w2}, kernel
    up, down, mid = rand(8, 2, 1), rand(2, 6, 1), rand(2, 2, 3)
    own = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": 1.0}
    yield "tucker", "line", own, core(mid, up[..., 0].T, down[..., 0]) / 2
    up, down, mid = rand(12, 2, 1, 1), rand(2, 4, 1, 1), rand(2, 2, 3, 3)
    own = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}
    yield "grouped tucker", "conv", own, core(mid, up[..., 0, 0].T, down[..., 0, 0])


CASES = {name: rest for name, *rest in _cases()}


def written(path, name, own):
    tensors = {
        f"lycoris_{name}.{key}": torch.as_tensor(value).contiguous() for key, value in own.items()
    }
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_lycoris_is_its_formula_and_is_written_as_it_was(case, tmp_path):
    name, own, change = CASES[case]
    tensors = written(tmp_path / "a.safetensors", name, own)
    base, model = layers(), layers()
    load(model, tmp_path / "a.safetensors")
    W = base.get_submodule(name).weight
    close(model(INPUTS), of_weights(base, {name: W + change.reshape(W.shape)}))
    save(model, tmp_path / "b.safetensors", format="kohya")
    again = load_file(tmp_path / "b.safetensors")
    again = {key.replace("lora_unet", "lycoris"): tensor for key, tensor in again.items()}
    for key, tensor in tensors.items():
        if not key.endswith("alpha"):
            assert torch.equal(again.pop(key), tensor)
    assert all(key.endswith("alpha") for key in again)
    other = layers()
    load(other, tmp_path / "b.safetensors")
    assert all(map(torch.equal, other(INPUTS), model(INPUTS)))
    load(model, tmp_path / "a.safetensors")  # into the adapter that is there
    assert all(map(torch.equal, other(INPUTS), model(INPUTS)))
    strip(model)
    assert all(map(torch.equal, model(INPUTS), base(INPUTS)))


def lengths(V, dim):
    """The lengths along a dimension, in a shape in which they divide the weight."""
    shape = [-1 if i == dim else 1 for i in range(V.dim())]
    return V.transpose(0, dim).flatten(1).norm(dim=1).reshape(shape)


@pytest.mark.parametrize("by", ["rows", "columns", "a flat tensor of rows", "one of columns"])
@pytest.mark.parametrize("name", ["lin", "one", "line"])
def test_dora_scale_is_of_rows_or_of_columns_by_its_shape(name, by, tmp_path):
    base, model = layers(), layers()
    W = base.get_submodule(name).weight.detach()
    kernel, dim = W.shape[2:], 1 if "columns" in by else 0
    ones = (1,) * len(kernel)
    up, down = rand(W.shape[0], 2, *ones), rand(2, W.shape[1], *kernel)
    scale = rand(W.shape[dim]).abs() + 0.5
    shape = (-1, 1, *ones) if dim == 0 else (1, -1, *ones)
    file_scale = scale if "of" in by else scale.reshape(shape)
    own = {"lora_up.weight": up, "lora_down.weight": down, "alpha": 4.0, "dora_scale": file_scale}
    tensors = written(tmp_path / "a.safetensors", name, own)
    load(model, tmp_path / "a.safetensors")
    V = W + 2 * (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    V = V * scale.reshape(shape if len(shape) == V.dim() else -1) / lengths(V, dim)
    close(model(INPUTS), of_weights(base, {name: V}))
    variant = adapters_of(model.get_submodule(name))[0].settings.variant.name
    assert variant == ("dora_columns" if dim else "dora")
    if dim:
        with pytest.raises(FormatError, match=f"{name} is a dora_columns.*not written"):
            save(model, tmp_path / "b.safetensors", format="kohya")
        with pytest.raises(FormatError, match="PEFT has no dora_columns"):
            save(model, tmp_path / "b")
    else:
        save(model, tmp_path / "b.safetensors", format="kohya")
        again = load_file(tmp_path / "b.safetensors")
        for key in ("lora_up.weight", "lora_down.weight"):
            assert torch.equal(again[f"lycoris_{name}.{key}"], tensors[f"lycoris_{name}.{key}"])
        assert torch.equal(again[f"lycoris_{name}.dora_scale"], scale.reshape(-1, 1, *ones))
        other = layers()
        load(other, tmp_path / "b.safetensors")
        assert all(map(torch.equal, other(INPUTS), model(INPUTS)))
    strip(model)
    assert all(map(torch.equal, model(INPUTS), base(INPUTS)))


def test_a_square_layer_is_told_by_shape_and_a_flat_tensor_refused(tmp_path):
    model = nn.ModuleDict({"sq": nn.Linear(5, 5)})
    own = {"lora_up.weight": rand(5, 2), "lora_down.weight": rand(2, 5)}
    for scale, variant in ((rand(5, 1), "dora"), (rand(1, 5), "dora_columns")):
        written(tmp_path / "a.safetensors", "sq", {**own, "dora_scale": scale.abs()})
        load(model, tmp_path / "a.safetensors")
        assert adapters_of(model["sq"])[0].settings.variant.name == variant
        strip(model)
    written(tmp_path / "a.safetensors", "sq", {**own, "dora_scale": rand(5).abs()})
    with pytest.raises(FormatError, match=r"whether of rows or of columns.*\(5, 1\) for rows"):
        load(model, tmp_path / "a.safetensors")
    written(tmp_path / "a.safetensors", "sq", {**own, "dora_scale": rand(4, 1)})
    with pytest.raises(FormatError, match=r"dora_scale of sq is \(4, 1\), where 5 features"):
        load(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"hada_w1_a": rand(18, 2)}, r"lin has \['hada_w1_a'\], which is no loha"),
        ({**CASES["loha"][1], "hada_t1": rand(3, 3, 1)}, "which is no loha"),
        ({**CASES["loha"][1], "dora_scale": rand(18, 1)}, "DoRA of a loha.*Merge it"),
        ({"lokr_w1": rand(3, 4)}, "which is no lokr"),
        ({"lokr_w1": rand(3, 4), "lokr_w1_a": rand(3, 1), "lokr_w2": rand(6, 3)}, "is no lokr"),
        ({"lokr_w1": rand(3, 4), "lokr_w2": rand(6, 3), "lokr_t2": rand(1, 1, 1)}, "is no lokr"),
        ({"lokr_w1": rand(3, 4), "hada_w1_a": rand(18, 2)}, "which is no l"),
        ({"lokr_w1": rand(3), "lokr_w2": rand(6, 3)}, "fewer than two dimensions"),
        ({"lokr_w1": rand(3, 0), "lokr_w2": rand(6, 3)}, "is empty"),
        ({"lokr_w1_a": rand(3, 2), "lokr_w1_b": rand(2, 0), "lokr_w2": rand(6, 3)}, "is empty"),
        ({"lokr_w1": rand(5, 4), "lokr_w2": rand(6, 3)}, "a w1 of 5 x 4 does not divide 18 x 12"),
        ({"lokr_w1": rand(3, 4), "lokr_w2": rand(5, 3)}, "of another shape"),
        ({"lokr_w1_a": rand(3, 2), "lokr_w1_b": rand(1, 4), "lokr_w2": rand(6, 3)},
         "of another shape"),
        ({"lora_mid.weight": rand(2, 2, 3)}, "of what makes an adapter"),
        ({"lora_up.weight": rand(18, 2), "lora_down.weight": rand(2, 12),
          "lora_mid.weight": rand(2, 2, 1)}, "for kernels of convolutions"),
        ({"hada_t1": rand(2, 2, 1)}, "which is no loha"),
        ({"lokr_t1": rand(2, 2, 1)}, "of no kind that is supported"),
    ],
)  # fmt: skip
def test_what_is_no_whole_adapter_is_refused_before_anything_changes(own, message, tmp_path):
    written(tmp_path / "a.safetensors", "lin", own)
    model = layers()
    before = model(INPUTS)
    with pytest.raises(LoRAInjectError, match=message):
        load(model, tmp_path / "a.safetensors")
    assert all(map(torch.equal, model(INPUTS), before))
    assert type(model.lin) is nn.Linear


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
    config.target_modules = NAMES[:3] if config.use_effective_conv2d else NAMES
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


def test_a_file_shows_its_variant(tmp_path):
    written(tmp_path / "a.safetensors", "lin", CASES["lokr of products"][1])
    shown = inspect(tmp_path / "a.safetensors")
    (pair,) = shown.to_dict()["pairs"]
    assert (pair["variant"], pair["rank"], pair["norm"]) == ("lokr", 2, None)
    assert shown.data.elements == sum(t.numel() for t in CASES["lokr of products"][1].values()
                                      if isinstance(t, torch.Tensor))  # fmt: skip
    assert "linear, lokr" in str(shown)


def test_weights_are_divided_as_peft_divides_them():
    for size in range(1, 200):
        for factor in (-1, *range(1, 20)):
            assert divided(size, factor) == factorization(size, factor), (size, factor)


ALGORITHMS = [
    *((algo, more) for algo in ("loha", "lokr", "locon") for more in ({}, {"use_tucker": True})),
    ("lokr", {"decompose_both": True, "factor": 3}),
    ("locon", {"weight_decompose": True}),
    ("locon", {"weight_decompose": True, "wd_on_out": False}),
]


@pytest.mark.parametrize(("algo", "more"), ALGORITHMS)
def test_lycoris_computes_the_same_of_its_own_files_and_they_are_written_again(
    algo, more, tmp_path
):
    """Its forward is the oracle: what it merges has the scale of LoHa and LoKr twice."""
    modules = pytest.importorskip("lycoris.modules")
    made = {"loha": modules.LohaModule, "lokr": modules.LokrModule, "locon": modules.LoConModule}
    base, model, outputs, tensors = layers(), layers(), {}, {}
    for name in NAMES:
        if name == "conv" and "weight_decompose" in more:
            continue  # its columns of grouped channels are refused
        layer = base.get_submodule(name)
        module = made[algo](name, layer, lora_dim=2, alpha=1, bypass_mode=False, **more)
        outputs[name] = moved(module)(INPUTS[name])
        tensors |= {
            f"lycoris_{name}.{k}": v.detach().clone().contiguous()
            for k, v in module.custom_state_dict().items()
        }
    save_file(tensors, tmp_path / "a.safetensors")
    load(model, tmp_path / "a.safetensors")
    close([model.get_submodule(name)(INPUTS[name]) for name in outputs], outputs.values())
    if more.get("wd_on_out") is False or algo == "locon":
        return  # written otherwise, or not
    save(model, tmp_path / "b.safetensors", format="kohya")
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_one_A_for_all_groups_of_a_kernel_is_one_for_each(tmp_path):
    up, down = rand(12, 2, 1, 1), rand(2, 4, 3, 3)
    written(tmp_path / "a.safetensors", "conv", {"lora_up.weight": up, "lora_down.weight": down})
    base, model = layers(), layers()
    load(model, tmp_path / "a.safetensors")
    W = base.conv.weight
    change = (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    close(model(INPUTS), of_weights(base, {"conv": W + change}))
