"""Files of LyCORIS in kohya's format: the formulas written out, and LyCORIS as the oracle."""

import math

import pytest
import torch
from lycoris_layers import INPUTS, NAMES, close, layers, moved, of_weights
from safetensors.torch import load_file, save_file
from torch import nn

from lora_inject import FormatError, LoRAInjectError, LoRAInjectWarning, load, save, strip
from lora_inject.core.state import adapters_of
from lora_inject.files.convert import inspect

pytestmark = pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted")


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
    for alpha in (0.5, 3e9, math.inf, math.nan):  # which LyCORIS does not read then
        yield f"lokr of whole ones, {alpha}", "lin", {**own, "alpha": alpha}, torch.kron(w1, w2)
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
        with pytest.warns(LoRAInjectWarning, match="LyCORIS alone computes a DoRA of rows"):
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


DECOMPOSED = [
    name for name, (layer, *_) in CASES.items() if name.startswith("lo") and layer != "conv"
]


@pytest.mark.parametrize("by", ["dora", "dora_columns"])
@pytest.mark.parametrize("case", [*DECOMPOSED, "loha of a grouped kernel", "lokr with a core"])
def test_dora_scale_beside_a_loha_or_lokr_is_of_the_weight_with_it(case, by, tmp_path):
    name, own, change = CASES[case]
    base, model = layers(), layers()
    W = base.get_submodule(name).weight.detach()
    dim = 1 if "columns" in by else 0
    scale = rand(W.shape[dim]).abs() + 0.5
    scale = scale.reshape([-1 if i == dim else 1 for i in range(W.dim())])
    tensors = written(tmp_path / "a.safetensors", name, {**own, "dora_scale": scale})
    if name == "conv" and dim:
        with pytest.raises(LoRAInjectError, match=r"no columns of grouped channels\. Use 'dora_lo"):
            load(model, tmp_path / "a.safetensors")
        return
    load(model, tmp_path / "a.safetensors")
    V = W + change.reshape(W.shape)
    close(model(INPUTS), of_weights(base, {name: V * scale / lengths(V, dim)}))
    variant = adapters_of(model.get_submodule(name))[0].settings.variant.name
    assert variant == f"{by}_{case[:4]}"
    if dim:
        with pytest.raises(FormatError, match=f"{name} is a {variant}.*not written"):
            save(model, tmp_path / "b.safetensors", format="kohya")
    else:
        with pytest.warns(LoRAInjectWarning, match="LyCORIS alone computes a DoRA of rows"):
            save(model, tmp_path / "b.safetensors", format="kohya")
        again = load_file(tmp_path / "b.safetensors")
        for key, tensor in tensors.items():
            if not key.endswith("alpha"):
                assert torch.equal(again[key], tensor)
        other = layers()
        load(other, tmp_path / "b.safetensors")
        assert all(map(torch.equal, other(INPUTS), model(INPUTS)))
    with pytest.raises(FormatError, match=f"PEFT has no {variant}"):
        save(model, tmp_path / "c")
    save(model, tmp_path / "d", portable=True, r=min(W.shape[0], W[0].numel()))
    plain = layers()
    load(plain, tmp_path / "d")
    close(plain(INPUTS), model(INPUTS))
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
        ({**CASES["loha"][1], "dora_scale": rand(4, 1)}, "is .4, 1., where 18 .* and 12 come in"),
        ({**CASES["lokr of products"][1], "dora_scale": rand(1, 4)}, "where 18 .* and 12 come in"),
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


def test_a_file_shows_its_variant(tmp_path):
    written(tmp_path / "a.safetensors", "lin", CASES["lokr of products"][1])
    shown = inspect(tmp_path / "a.safetensors")
    (pair,) = shown.to_dict()["pairs"]
    assert (pair["variant"], pair["rank"], pair["norm"]) == ("lokr", 2, None)
    assert shown.data.elements == sum(t.numel() for t in CASES["lokr of products"][1].values()
                                      if isinstance(t, torch.Tensor))  # fmt: skip
    assert "linear, lokr" in str(shown)


ALGORITHMS = [
    *((algo, more) for algo in ("loha", "lokr", "locon") for more in ({}, {"use_tucker": True})),
    ("lokr", {"decompose_both": True, "factor": 3}),
    *(
        (algo, {"weight_decompose": True, "wd_on_out": on_out})
        for algo in ("locon", "loha", "lokr")
        for on_out in (True, False)
    ),
    ("loha", {"weight_decompose": True, "use_tucker": True}),
    ("lokr", {"weight_decompose": True, "decompose_both": True, "factor": 3}),
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
