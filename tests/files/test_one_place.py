"""Two names of one place in a file: refused with both, unless they have the same values."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_inject import FormatError, load
from lora_inject.files.formats.one_place import is_repeated

pytestmark = pytest.mark.cpu("files are read on it")

P, K = "base_model.model.", "layers.q.lora_"


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleDict({"q": nn.Linear(4, 4)})})


def half(value):
    return {"A.weight": torch.full((2, 4), value), "B.weight": torch.full((4, 2), 0.2)}


def peft(folder, tensors, **config):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("other", [K, P + "module." + K, "module." + P + K, P + P + K])
@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_under_two_names_is_refused(other, order, tmp_path):
    names = (P + K, other)[::order]
    tensors = {
        n + k: v for n, x in zip(names, (0.1, -0.1), strict=True) for k, v in half(x).items()
    }
    with pytest.raises(FormatError, match=r"q.* and .*q.* are one place, and their values differ"):
        load(model(), peft(tmp_path, tensors))


@pytest.mark.parametrize("other", [K, P + "module." + K, "module." + P + K, P + P + K])
def test_the_same_values_under_two_names_are_read(other, tmp_path):
    tensors = {name + k: v for name in (P + K, other) for k, v in half(0.1).items()}
    loaded = load(model(), peft(tmp_path, tensors))
    assert torch.equal(loaded["layers"]["q"].lora_A, torch.full((2, 4), 0.1))


@pytest.mark.parametrize("other", [P + "layers.q.base_layer.bias", "module.layers.q.bias"])
def test_a_bias_under_two_names_is_refused(other, tmp_path):
    tensors = {P + K + k: v for k, v in half(0.1).items()}
    tensors |= {P + "layers.q.bias": torch.ones(4), other: torch.zeros(4)}
    with pytest.raises(FormatError, match=r"layers\.q.*bias and .* are one place"):
        load(model(), peft(tmp_path, tensors, bias="lora_only"))


@pytest.mark.parametrize("alpha", [None, 4.0])
def test_the_names_of_kohya_are_one_place_too(alpha, tmp_path):
    tensors = {}
    for prefix in ("lycoris", "lora_unet"):
        tensors[f"{prefix}_layers_q.lora_down.weight"] = torch.ones(2, 4)
        tensors[f"{prefix}_layers_q.lora_up.weight"] = torch.ones(4, 2)
    if alpha is not None:
        tensors["lycoris_layers_q.alpha"] = torch.tensor(alpha)
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    if alpha is None:
        assert torch.equal(load(model(), file)["layers"]["q"].lora_A, torch.ones(2, 4))
    else:
        with pytest.raises(FormatError, match="lora_unet_layers_q and lycoris_layers_q are one"):
            load(model(), file)


def test_another_dtype_or_shape_is_another_value():
    for other in (torch.ones(2, dtype=torch.float64), torch.ones(3), torch.zeros(2)):
        given = {}
        assert not is_repeated(given, "q", "a", torch.ones(2))
        assert is_repeated(given, "q", "b", torch.ones(2))
        with pytest.raises(FormatError, match="a and b are one place"):
            is_repeated(given, "q", "b", other)
