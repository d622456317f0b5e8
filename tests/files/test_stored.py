"""State dicts: what they hold, their keys, and what does not fit."""

import copy
import io

import pytest
import torch
from helpers import changed_parts, ids, randomize_adapters, snapshot
from stored_models import Tied, bare, trained
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    disabled,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    merged,
    save,
    strip,
    use,
)

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_state_dict_holds_what_was_trained(bias):
    model = trained(bias, train_also="head")
    state = lora_state_dict(model)
    owners = {"none": set(), "lora_only": {"q_proj", "v_proj"}}.get(bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(state) == trainable
    biases = {k.split(".")[-2] for k in state if k.endswith("bias") and not k.startswith("head")}
    assert biases == owners if owners is not None else len(biases) == 4
    x = ids()
    twin = bare()
    inject(twin, ["q_proj", "v_proj"], r=2, alpha=3, bias=bias, train_also="head")
    assert not torch.equal(twin(x), model(x))
    assert load_lora_state_dict(twin, state) is twin
    assert torch.equal(twin(x), model(x))
    before = snapshot(bare())["state"]
    strip(twin)
    assert snapshot(twin)["state"] == before


def test_another_bias_mode_would_lose_something():
    model = trained("lora_only")
    assert lora_state_dict(model, "lora_only").keys() == lora_state_dict(model).keys()
    with pytest.raises(
        ArgumentError,
        match=r"bias='none', but 'default' was trained with "
        r"bias='lora_only': 4 trained tensors, such as .*bias, would be lost",
    ):
        lora_state_dict(model, "none")  # fmt: skip
    with pytest.raises(ArgumentError, match="no bias was trained"):
        lora_state_dict(trained(), "all")


def test_keys_are_loralibs():
    loralib = pytest.importorskip("loralib")

    layer = loralib.Linear(8, 6, r=2, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    theirs = loralib.lora_state_dict(nn.Sequential(layer))
    model = nn.Sequential(nn.Linear(8, 6))
    model.load_state_dict(
        {k: v for k, v in layer.state_dict(prefix="0.").items() if "lora" not in k}
    )
    inject(model, "0", r=2, alpha=4)
    assert set(lora_state_dict(model)) == set(theirs)
    load_lora_state_dict(model, theirs)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), layer(x))


def test_an_adapter_of_several_is_named():
    model = bare()
    inject(model, "q_proj", r=2, adapter="fr")
    inject(model, "v_proj", r=2, adapter="de")
    with pytest.raises(ArgumentError, match=r"several adapters, \['de', 'fr'\]"):
        lora_state_dict(model)
    assert {key.split(".")[-2] for key in lora_state_dict(model, adapter="fr")} == {"q_proj"}
    use(model, "de")
    assert {key.split(".")[-2] for key in lora_state_dict(model)} == {"v_proj"}
    with pytest.raises(ArgumentError, match="no adapter 'es'"):
        lora_state_dict(model, adapter="es")
    with pytest.raises(LoRAInjectError, match="no adapters"):
        lora_state_dict(bare())
    for block in (merged, disabled):
        with block(model), pytest.raises(LoRAInjectError, match=r"merged now|disabled block"):
            lora_state_dict(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.q_proj.lora_A"), r"1 missing \(layers.0.q_proj.lora_A\)"),
        (lambda s: s.update({"x.lora_A": torch.ones(2)}), r"1 unexpected \(x.lora_A\)"),
        (lambda s: s.update({"layers.0.q_proj.lora_A": torch.ones(2, 9)}),
         r"1 of another shape \(layers.0.q_proj.lora_A \(2, 9\), not \(2, 8\)\)"),
        (lambda s: s.update({"layers.0.q_proj.lora_A": torch.ones(3, 8),
                             "layers.0.q_proj.lora_B": torch.ones(8, 3)}), "2 of another shape"),
        (lambda s: s["layers.0.q_proj.lora_B"].fill_(float("nan")), "1 not finite"),
        (lambda s: s["layers.0.q_proj.lora_B"].fill_(float("inf")), "1 not finite"),
        (lambda s: s.clear(), r"8 missing .*, \.\.\.\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_whole(change, message):
    model = trained()
    state = {key: value.clone() for key, value in lora_state_dict(model).items()}
    before = snapshot(model)
    change(state)
    with pytest.raises(FormatError, match=message):
        load_lora_state_dict(model, state)
    assert changed_parts(before, snapshot(model)) == []


def test_prefixes_of_wrappers_are_understood(tmp_path):
    model, x = trained(), ids()
    state = lora_state_dict(model)
    for prefix in ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod."):
        twin = bare()
        inject(twin, ["q_proj", "v_proj"], r=2, alpha=3)
        load_lora_state_dict(twin, {prefix + key: value for key, value in state.items()})
        assert torch.equal(twin(x), model(x))
    wrapped = torch.compile(model, backend="eager")
    assert lora_state_dict(wrapped).keys() == state.keys()
    save(nn.DataParallel(model), tmp_path)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))
    inside = torch.compile(bare(), backend="eager")
    torch.testing.assert_close(load(inside, tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "value",
    [None, 3, [1.0], torch.ones(2, 8).to_sparse(), torch.ones(2, 8, device="meta"),
     torch.ones(2, 8, dtype=torch.complex64), torch.ones(2, 8).to(torch.float8_e4m3fn),
     torch.ones(2, 8, dtype=torch.int64)],
    ids=lambda value: str(getattr(value, "dtype", value)),
)  # fmt: skip
def test_odd_values_in_a_state_dict(value):
    model = trained()
    state = {**lora_state_dict(model), "layers.0.q_proj.lora_A": value}
    with pytest.raises(FormatError, match=r"layers\.0\.q_proj\.lora_A"):
        load_lora_state_dict(model, state)
    arrays = {key: value.cpu().numpy() for key, value in lora_state_dict(trained()).items()}
    with pytest.raises(FormatError, match=r"8 numpy arrays, of which torch\.from_numpy makes"):
        load_lora_state_dict(model, arrays)
    for odd in (5, [("a", 1)], {1: torch.ones(1)}):
        with pytest.raises(ArgumentError, match="state must be a mapping"):
            load_lora_state_dict(model, odd)


def test_numpy_arrays_are_told_from_other_values(tmp_path):
    model = trained()
    arrays = {key: tensor.numpy() for key, tensor in lora_state_dict(model).items()}
    with pytest.raises(FormatError, match=r"8 numpy arrays, of which torch\.from_numpy makes .*A"):
        load_lora_state_dict(model, arrays)
    torch.save(arrays, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"Of numpy arrays torch\.from_numpy makes tensors"):
        load(model, tmp_path / "a.pt", alpha=3)


def test_two_keys_that_mean_one_and_names_of_real_modules():
    model = trained()
    state = lora_state_dict(model)
    key = next(iter(state))
    with pytest.raises(FormatError, match=rf"two of the keys mean {key}: {key} and module\.{key}"):
        load_lora_state_dict(model, {**state, f"module.{key}": state[key]})
    real = nn.ModuleDict({"q": nn.Linear(2, 2), "module": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    inject(real, lambda path, _: path == "q", r=1)
    own = {f"module.{key}": value for key, value in lora_state_dict(real).items()}
    with pytest.raises(FormatError, match="2 missing"):
        load_lora_state_dict(real, own)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, through_a_file])
@pytest.mark.parametrize("other", [{"alpha": 16}, {"r": 4}, {"r": 3, "scaling": "rslora"}])
def test_a_state_keeps_its_update_under_another_scaling_and_rank(way, other):
    """A rank that is padded halves the update where alpha stays: the scaling goes into B."""
    model, x = trained(), ids()
    twin = bare()
    inject(twin, ["q_proj", "v_proj"], **{"r": 2, "alpha": 3, **other})
    load_lora_state_dict(twin, way(lora_state_dict(model)))
    torch.testing.assert_close(twin(x), model(x))
    load_lora_state_dict(twin, dict(lora_state_dict(model)))  # tensors alone, taken as they are
    assert not torch.allclose(twin(x), model(x), rtol=1e-3)


@pytest.mark.parametrize("place", ["emb", "head"])
def test_one_name_means_one_tensor_of_a_tied_pair(place):
    torch.manual_seed(0)
    base, tokens = Tied(), torch.arange(9)
    model = copy.deepcopy(base)
    inject(model, place, r=2, alpha=3)
    randomize_adapters(model)
    state, all_of_it = lora_state_dict(model), model.state_dict()
    assert {key for key in all_of_it if "lora_" in key} == set(state)
    assert all(state[key].data_ptr() == all_of_it[key].data_ptr() for key in state)
    twin, plain, untied = copy.deepcopy(base), copy.deepcopy(base), copy.deepcopy(base)
    inject(twin, place, r=2, alpha=3)
    twin.load_state_dict(state, strict=False)
    inject(plain, place, r=2, alpha=3)
    load_lora_state_dict(plain, dict(state))
    assert torch.equal(twin(tokens), model(tokens))
    assert torch.equal(plain(tokens), model(tokens))
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    inject(untied, ["emb", "head"], r=2, alpha=3)
    load_lora_state_dict(untied, state)
    torch.testing.assert_close(untied(tokens), model(tokens))
