"""Which adapters were in use while another one trained, and what files and loading say of it."""

import warnings

import pytest
import torch
from helpers import Net, ids, train_steps
from stored_models import bare

from lora_inject import LoRAInjectWarning, freeze, inject, load, remove, save, use
from lora_inject.core.company import company
from lora_inject.core.look import Look

pytestmark = pytest.mark.usefixtures("device")


def apart():
    """Two adapters, each of which has been trained alone."""
    torch.manual_seed(0)
    model = Net()
    inject(model, "q_proj", r=2, adapter="sft")
    train_steps(model, ids())
    inject(model, "v_proj", r=2, adapter="rl")
    use(model, "rl")
    train_steps(model, ids())
    return model


def known(model):
    return {name: set(others) for name, others in company(Look(model)).items()}


def test_adapters_that_trained_alone_need_no_other():
    model, x = apart(), ids()
    assert known(model) == {}
    use(model, "sft", "rl")  # to look at their sum
    model(x).sum()
    assert known(model) == {}
    use(model, {"sft": 0.5, "rl": 0.5})
    use(model)
    assert known(model) == {}


def test_what_trained_on_top_is_remembered_whatever_is_used_later():
    model = apart()
    use(model, "sft", "rl", train="rl")
    assert known(model) == {}  # nothing has trained yet
    train_steps(model, ids())
    assert known(model) == {"rl": {"sft"}}
    for later in (lambda: use(model, "rl"), lambda: freeze(model), lambda: use(model),
                  lambda: inject(model, "o_proj", r=2, adapter="third"),
                  lambda: remove(model, "third")):  # fmt: skip
        later()
        assert known(model) == {"rl": {"sft"}}


def test_a_new_adapter_joins_those_in_use():
    torch.manual_seed(0)
    model = Net()
    inject(model, "q_proj", r=2, adapter="a")
    train_steps(model, ids())
    inject(model, "v_proj", r=2, adapter="b")
    assert known(model) == {}
    train_steps(model, ids())
    assert known(model) == {"a": {"b"}, "b": {"a"}}


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_the_file_says_it_and_load_warns_until_it_is_there(format, tmp_path):
    model, x = apart(), ids()
    use(model, "sft", "rl", train="rl")
    train_steps(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("sft", "rl"):
            save(model, tmp_path / name, adapter=name, format=format)
        both = bare()
        load(both, tmp_path / "sft", adapter="sft")
        with pytest.warns(LoRAInjectWarning, match="'rl' is loaded and not in use"):
            load(both, tmp_path / "rl", adapter="rl")
        use(both, "sft", "rl")
        assert torch.equal(both(x), model(x))
    alone = bare()
    said = r"trained with \['sft'\] in use.*use\(model, 'sft', 'mine'\)"
    with pytest.warns(LoRAInjectWarning, match=said):
        load(alone, tmp_path / "rl", adapter="mine")
    assert known(alone) == {"mine": {"sft"}}
    save(alone, tmp_path / "again")
    with pytest.warns(LoRAInjectWarning, match=said):
        load(alone, tmp_path / "again", adapter="mine")


def test_a_format_without_a_word_for_it_is_not_written_in_silence(tmp_path):
    model = apart()
    use(model, "sft", "rl", train="rl")
    train_steps(model, ids())
    with pytest.warns(LoRAInjectWarning, match=r"with \['sft'\] in use, and loralib has no word"):
        save(model, tmp_path / "a.pt", adapter="rl", format="loralib")
    save(model, tmp_path / "b.pt", adapter="sft", format="loralib")
