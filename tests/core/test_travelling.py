"""Settings travel with tensors in state dicts, under the keys that these had, and are compared."""

import copy
import io
import pickle

import pytest
import torch
from helpers import Net, changed_parts, randomize_adapters, snapshot
from torch import nn

from lora_inject import FormatError, disabled, freeze, inject, merged, strip, use
from lora_inject.core.travelling import ENTRY, as_entry

pytestmark = pytest.mark.usefixtures("device")


def adapted(**settings):
    torch.manual_seed(0)
    model = Net()
    inject(model, ["q_proj", "v_proj"], **{"r": 2, "alpha": 16, "seed": 0, **settings})
    randomize_adapters(model)
    return model


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OTHERS = [({"alpha": 2}, "alpha=2"), ({"scaling": "rslora"}, "rslora"), ({"fixed": "A"}, "A fixed")]


@pytest.mark.parametrize("way", [dict, through_a_file, copy.copy, copy.deepcopy])
@pytest.mark.parametrize(("other", "named"), OTHERS)
def test_a_state_dict_of_other_settings_is_refused(other, named, way):
    state, model = adapted().state_dict(), adapted(**other)
    before = snapshot(model)
    if way is dict:  # a plain dict says no settings, and loads as ever
        assert not model.load_state_dict(way(state)).missing_keys
        return
    for strict in (True, False):
        with pytest.raises(FormatError, match=f"4 of the pairs .*with r=2, alpha=16, .*{named}"):
            model.load_state_dict(way(state), strict=strict)
    assert changed_parts(before, snapshot(model)) == []
    same = adapted()
    same.load_state_dict(way(state))


def test_the_keys_are_what_they_were():
    model = adapted()
    base = Net().state_dict()
    own = {key for key in model.state_dict() if "lora_" not in key}
    assert own == base.keys()
    assert {key.rpartition(".")[2] for key in model.state_dict().keys() - own} == {
        "lora_A", "lora_B"
    }  # fmt: skip
    model.load_state_dict(base, strict=False)
    assert not Net().load_state_dict(model.state_dict(), strict=False).missing_keys


def test_what_runs_changes_nothing_about_what_travels():
    model, other = adapted(), adapted(alpha=2)
    for state in (
        use(copy.deepcopy(model)).state_dict(),
        use(copy.deepcopy(model), {"default": 0.5}).state_dict(),
    ):
        for target in (other, use(copy.deepcopy(other))):
            with pytest.raises(FormatError, match="other settings"):
                target.load_state_dict(state)
    for block in (disabled, merged):
        with block(other), pytest.raises(FormatError, match="other settings"):
            other.load_state_dict(adapted().state_dict())


def test_wholes_parts_wrappers_and_copies():
    state = adapted().state_dict()
    other = adapted(alpha=2)
    for holder in (
        nn.ModuleDict({"module": other}),
        nn.ModuleDict({"module": copy.deepcopy(other)}),
        nn.ModuleDict({"module": pickle.loads(pickle.dumps(other))}),
    ):
        held = nn.ModuleDict({"module": adapted()}).state_dict()
        with pytest.raises(FormatError, match="other settings"):
            holder.load_state_dict(held)
        with pytest.raises(FormatError, match="other settings"):
            holder["module"].load_state_dict(state)
    parts = nn.ModuleList([adapted(), nn.Linear(2, 2)])
    freeze(parts, train_also="re:1")  # and so they are adapted as a whole
    with pytest.raises(FormatError, match="other settings"):
        parts.load_state_dict(nn.ModuleList([adapted(alpha=2), nn.Linear(2, 2)]).state_dict())
    with pytest.raises(FormatError, match="other settings"):  # and the other way round
        nn.ModuleList([adapted(alpha=2), nn.Linear(2, 2)]).load_state_dict(parts.state_dict())
    base = adapted().state_dict()
    for key in [key for key in base if "lora_" in key]:
        del base[key]  # the base's values alone: no adapter's settings matter
    other.load_state_dict(base, strict=False)


def test_adapters_are_compared_each_with_its_own():
    model, other = adapted(), adapted()
    inject(model, "head", r=2, alpha=4, adapter="fr")
    inject(other, "head", r=2, alpha=8, adapter="fr")
    with pytest.raises(FormatError, match=r"1 of the pairs .*: head\.lora_A_fr with r=2, alpha=4"):
        other.load_state_dict(model.state_dict())


def test_files_of_tensors_alone_have_an_entry():
    model = adapted()
    tensors = {**dict(model.state_dict()), ENTRY: as_entry(model)}
    same, other = adapted(), adapted(alpha=2)
    result = same.load_state_dict(tensors)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with pytest.raises(FormatError, match="other settings"):
        other.load_state_dict(tensors)
    for odd in (
        torch.ones(3),
        torch.ones(2, dtype=torch.uint8),
        "x",
        torch.tensor([91, 93]).byte(),
    ):
        with pytest.raises(FormatError, match="cannot be read"):
            other.load_state_dict({**tensors, ENTRY: odd})


def test_strip_takes_the_hooks_off():
    model = strip(adapted())
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks
    assert "lora_inject" not in model.state_dict()._metadata[""]
