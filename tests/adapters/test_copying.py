"""A copy of an adapter is another one with the same values, whatever it is made of."""

import pytest
import torch
from families import FAMILIES
from helpers import changed_parts, randomize_adapters, raw, snapshot
from torch import nn

from lora_inject import inject, lora_state_dict, remove, use
from lora_inject.adapters.copying import copy_adapter
from lora_inject.adapters.use import in_use
from lora_inject.core.look import Look

pytestmark = pytest.mark.usefixtures("device")
WAYS = {
    "lora": {},
    "rslora": {"scaling": "rslora", "alpha": 16},
    "dora": {"variant": "dora"},
    "loha": {"variant": "loha"},
    "pissa": {"init": "pissa"},
    "fixed": {"fixed": "A"},
    "biases": {"bias": "all"},
    "norm": {"train_also": "norm"},
    "dropout": {"dropout": {"input": 0.1, "module": 0.1}},
}


def built(family="llama", targets="all-linear", **settings):
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    inject(model, targets, **{"r": 2, **settings})
    randomize_adapters(model)
    return model, FAMILIES[family].inputs()


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same_and_does_not_train(way):
    model, inputs = built(**WAYS[way])
    expected, before = outputs(model, inputs), snapshot(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    copy_adapter(Look(model), "default", "copy")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert torch.equal(outputs(model, inputs), expected)
    own, copied = (lora_state_dict(model, adapter=name) for name in ("default", "copy"))
    assert {key: raw(t) for key, t in copied.items()} == {key: raw(t) for key, t in own.items()}
    randomize_adapters(model, names=["default"])
    use(model, "copy", train="default")
    assert torch.equal(outputs(model, inputs), expected)
    use(model, "default")
    remove(model, "copy")
    assert "parameters" not in changed_parts(before, snapshot(model))


@pytest.mark.parametrize(
    ("family", "targets"), [("mixtral", ["gate_up_proj", "down_proj"]), ("gpt2", "c_attn")]
)
def test_copies_on_other_kinds_of_layers(family, targets):
    parts = {"parts": {"c_attn": ("q", None, "v")}} if family == "gpt2" else {}
    model, inputs = built(family, targets, **parts)
    expected = outputs(model, inputs)
    copy_adapter(Look(model), "default", "copy")
    use(model, "copy")
    assert torch.equal(outputs(model, inputs), expected)


def test_a_copy_of_tied_layers_is_tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["emb"].weight
    inject(model, "emb", r=2)
    randomize_adapters(model)
    copy_adapter(Look(model), "default", "copy")
    assert model["emb"].lora_A_copy is model["head"].lora_A_copy


def test_parts_that_were_adapted_under_one_path_have_copies_of_their_own():
    parts = [nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))]
    for part in parts:
        inject(part, "0", r=2)
        randomize_adapters(part)
    model, x = nn.Sequential(*parts), torch.randn(3, 4)
    expected = model(x)
    copy_adapter(Look(model), "default", "copy")
    use(model, "copy")
    assert torch.equal(model(x), expected)


def test_in_a_block_another_adapter_runs_and_flags_and_gradients_stay():
    model, inputs = built(bias="lora_only")
    expected = outputs(model, inputs)
    copy_adapter(Look(model), "default", "copy")
    randomize_adapters(model, names=["default"])
    moved = outputs(model, inputs)
    model(**inputs)[0].sum().backward()
    before = snapshot(model)
    with in_use(Look(model), {"copy": 1.0}):
        assert torch.equal(outputs(model, inputs), expected)
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(outputs(model, inputs), moved)
    with pytest.raises(KeyError), in_use(Look(model), {}):
        raise KeyError
    assert torch.equal(outputs(model, inputs), moved)
