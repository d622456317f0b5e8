"""The fingerprint of the base: which models are the one that an adapter was made for."""

import copy
import json

import pytest
import torch
from helpers import Net, changed_parts, ids, snapshot
from stored_models import SAFE, bare, trained
from torch import nn

from lora_inject import (
    FormatError,
    LoRAInjectError,
    LoRAInjectWarning,
    inject,
    load,
    merge,
    save,
    strip,
    use,
)
from lora_inject.files import fingerprint, untouched
from lora_inject.files.formats.storage import read_tensors

pytestmark = pytest.mark.usefixtures("device")


def test_an_adapter_on_the_wrong_base_is_refused(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path)
    other = bare()
    with torch.no_grad():
        other.layers[1].v_proj.weight.mul_(1.001)
    before = snapshot(other)
    with pytest.raises(FormatError, match=r"1 of 4 adapted weights .*: layers.1.v_proj.weight\."):
        load(other, tmp_path)
    assert changed_parts(before, snapshot(other)) == []
    assert load(other, tmp_path, other_base=True) is other
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # the same base in other numbers
        load(bare().to(dtype), tmp_path)
    half = Net(dtype=torch.bfloat16)
    half.load_state_dict(bare().state_dict())
    inject(half, "q_proj", r=2)
    save(half, tmp_path / "half")
    load(bare(), tmp_path / "half")
    assert torch.equal(load(bare(), tmp_path)(x), model(x))


def test_a_model_of_another_size_says_the_shapes_first(tmp_path):
    def model(width):
        return nn.Sequential(nn.Linear(width, width))

    small = model(4)
    inject(small, "0", r=2)
    save(small, tmp_path)
    said = r"^0\.weight has the shape \(8, 8\) here, and \(4, 4\) in the model of the adapter"
    with pytest.raises(FormatError, match=said):
        load(model(8), tmp_path)


def test_a_default_device_changes_nothing_about_files(tmp_path):
    model, x = trained(), ids()
    fingerprint._places.cache_clear()
    with torch.device("meta"):
        save(model, tmp_path)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))


def test_bases_that_are_the_same_and_that_are_not(tmp_path):
    whole = bare()
    for saved, loaded in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        model = copy.deepcopy(whole).to(saved)
        inject(model, "q_proj", r=2)
        save(model, tmp_path)
        load(copy.deepcopy(whole).to(loaded), tmp_path)
    for value in (float("nan"), 1.0):
        model = copy.deepcopy(whole)
        with torch.no_grad():
            model.layers[0].q_proj.weight[0, 0] = value
        inject(model, "q_proj", r=2)
        save(model, tmp_path)
        load(strip(copy.deepcopy(model)), tmp_path)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    other = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    normed, other = nn.ModuleList([normed]), nn.ModuleList([other])
    inject(normed, "0", r=1)
    save(normed, tmp_path)
    with pytest.raises(FormatError, match="not those that the adapter was made for"):
        load(other, tmp_path)
    merge(model)
    with pytest.raises(LoRAInjectError, match="merged now"):
        load(model, tmp_path)


@pytest.mark.parametrize("seen", [torch.bfloat16, torch.float16])
def test_a_base_that_was_cast_and_cast_back_is_the_same_base(seen, tmp_path):
    """Training scripts cast the base down, train, and cast all up again before saving."""
    model = bare().to(seen)
    inject(model, "q_proj", r=2)
    save(model.float(), tmp_path / "cast")
    kept = bare()
    inject(kept, "q_proj", r=2)
    save(kept, tmp_path / "kept")
    for folder in (tmp_path / "cast", tmp_path / "kept"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            load(bare().to(dtype), folder)
        load(bare().to(seen).float(), folder)
        other = bare()
        with torch.no_grad():
            other.layers[0].q_proj.weight.mul_(1.05)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(FormatError, match="not those that the adapter was made for"):
                load(copy.deepcopy(other).to(dtype), folder)


def test_small_weights_are_the_same_in_both_16_bit_types(tmp_path):
    small = bare()
    with torch.no_grad():
        small.layers[0].q_proj.weight.mul_(1e-5)  # float16 holds few digits of these
    model = copy.deepcopy(small).half()
    inject(model, "layers.0.q_proj", r=2)
    save(model, tmp_path)
    load(small.to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda w: w * (1 + 2.0**-9), "differ by rounding alone"),
        (lambda w: w.to(torch.bfloat16).float() * (1 + 2.0**-10), "differ by rounding alone"),
        (lambda w: torch.cat([w, w[:1]]), r"rows alone: .*resize_token_embeddings"),
        (lambda w: w * 1.1, "Load the right base model"),
        (lambda w: torch.cat([w, w[:, :1]], 1), "Load the right base model"),
    ],
)
def test_what_to_do_about_another_base_depends_on_how_it_differs(change, remedy, tmp_path):
    layer = nn.Linear(8, 8, bias=False)
    model = nn.ModuleDict({"q": layer})
    inject(model, "q", r=2)
    save(model, tmp_path)
    strip(model)
    new = change(layer.weight.detach())
    other = nn.ModuleDict({"q": nn.Linear(*new.T.shape, bias=False)})
    with torch.no_grad():
        other["q"].weight.copy_(new)
    with pytest.raises(FormatError, match=f"1 of 1 adapted weights .*{remedy}"):
        load(other, tmp_path)
    mixed = fingerprint.how_it_differs({"shape": [8], "dtype": "float32"}, layer.weight)
    assert mixed == ""


def with_head():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), "head": nn.Linear(8, 2)}
    )


def test_a_base_whose_other_weights_differ_is_loaded_with_a_warning(tmp_path):
    model = with_head()
    inject(model, "layers.1", r=2)
    save(model, tmp_path)
    other = with_head()
    other["head"].reset_parameters()  # as a new head of a checkpoint without one
    said = "2 weights beside the adapter .*: head.weight, head.bias. Outputs will be others"
    with pytest.warns(LoRAInjectWarning, match=said):
        load(other, tmp_path)
    with pytest.warns(LoRAInjectWarning, match=said):
        load(other, tmp_path)  # into the one that is there
    load(strip(other), tmp_path, other_base=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        load(with_head().to(dtype), tmp_path)
    fitting = with_head()
    inject(fitting, "layers.0", r=2, bias="all", adapter="mine")
    with torch.no_grad():
        fitting["head"].bias.add_(1)  # trained by another adapter: the base is the same
    use(fitting)
    load(fitting, tmp_path)


def test_the_sample_of_a_large_base_is_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(untouched, "MOST", 3)
    model = with_head()
    inject(model, "layers.1", r=2)
    save(model, tmp_path)
    own = json.loads(read_tensors(tmp_path / SAFE)[1]["lora_inject"])
    assert list(own["untouched"]) == ["layers.0.weight", "layers.2.bias", "head.bias"]
    assert all(len(each["values"]) == untouched.SAMPLES for each in own["untouched"].values())
    load(strip(model), tmp_path)
