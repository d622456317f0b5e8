"""PEFT's ``lora_bias``: a bias inside of B is read as a change of the layer's own bias."""

import copy
import json

import peft
import pytest
import torch
from helpers import PEFT_WARNS
from safetensors.torch import load_file, save_file
from stored_models import SAFE
from torch import nn

from lora_inject import FormatError, inject, load, save, strip, use
from lora_inject.files.convert import convert

pytestmark = PEFT_WARNS  # that a bias of B is no matrix
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias))


def written(folder, **config):
    torch.manual_seed(1)
    names = config.pop("target_modules", ["0", "2"])
    own = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, lora_bias=True, **config)
    model = peft.get_peft_model(net(), own)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_a_bias_of_b_is_a_trained_bias(config, tmp_path):
    theirs, model = written(tmp_path / "a", **config), net()
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-6)
    assert model[0].bias.requires_grad
    trained = model(X)
    use(model)
    assert torch.equal(model(X), net()(X))
    use(model, "default")
    assert torch.equal(model(X), trained)
    save(model, tmp_path / "b")  # as a bias that trained, which PEFT has too
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "b")
    torch.testing.assert_close(again(X), trained, rtol=1e-5, atol=1e-6)
    strip(model)
    assert torch.equal(model(X), net()(X))


def test_into_an_adapter_that_trains_biases_and_no_other(tmp_path):
    theirs, model = written(tmp_path / "a"), net()
    inject(model, ["0", "2"], r=2, alpha=3, bias="lora_only")
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-6)
    plain = net()
    inject(plain, ["0", "2"], r=2, alpha=3)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="bias='lora_only', but 'default' was trained with"):
        load(plain, tmp_path / "a")
    assert all(torch.equal(t, before[key]) for key, t in plain.state_dict().items())


def test_a_layer_without_a_bias_is_refused_with_the_remedy(tmp_path):
    theirs, model = written(tmp_path / "a"), net(bias=False)
    with pytest.raises(FormatError, match=r"2: the file adds to its bias.*torch\.zeros\(3\)"):
        load(model, tmp_path / "a")
    assert not hasattr(model[0], "lora_A")
    model[2].bias = nn.Parameter(torch.zeros(3))
    load(model, tmp_path / "a", other_base=True)
    bias = net()[2].bias
    torch.testing.assert_close(model(X) + bias, theirs(X), rtol=1e-5, atol=1e-6)


def test_files_that_contradict_themselves_are_refused(tmp_path):
    written(tmp_path / "a")
    tensors, config = load_file(tmp_path / "a" / SAFE), tmp_path / "a" / "adapter_config.json"
    key = "base_model.model.0.lora_B.bias"
    words = json.loads(config.read_text())

    def refused(message, lora_bias=True, **changes):
        config.write_text(json.dumps({**words, "lora_bias": lora_bias}))
        own = {k: t for k, t in {**tensors, **changes}.items() if t is not None}
        save_file(own, tmp_path / "a" / SAFE)
        with pytest.raises(FormatError, match=message):
            load(net(), tmp_path / "a")

    refused("lora_bias is True, and 0 has no bias of B", **{key: None})
    refused("lora_bias is False, and 0 has a bias of B", lora_bias=False)
    refused(r"the bias of B of 0 is \(5,\)", **{key: torch.zeros(5)})
    refused(r"\(6,\), torch\.int32", **{key: torch.zeros(6, dtype=torch.int32)})
    refused("not finite", **{key: torch.full((6,), torch.nan)})


def test_without_the_model_it_cannot_be_converted(tmp_path):
    written(tmp_path / "a")
    with pytest.raises(FormatError, match=r"lora_bias.*Load it into its model"):
        convert(tmp_path / "a", tmp_path / "b.pt", "loralib")
