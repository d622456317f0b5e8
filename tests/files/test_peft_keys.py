"""Keys of PEFT's files: what trainers leave in them, and modules that are called like wrappers."""

import copy

import pytest
import torch
from helpers import ids, randomize_adapters
from safetensors.torch import load_file, save_file
from stored_models import SAFE, bare, trained
from torch import nn

from lora_inject import FormatError, LoRAInjectWarning, inject, load, save
from lora_inject.files.convert import convert
from lora_inject.files.formats import find_format, kohya, peft
from lora_inject.files.formats.peft_keys import Names

pytestmark = pytest.mark.cpu("files are read on it")


def pickled(folder, change=lambda tensors: tensors):
    """The directory as PEFT wrote it before 0.7: a pickle, and no metadata."""
    torch.save(change(load_file(folder / SAFE)), folder / "adapter_model.bin")
    (folder / SAFE).unlink()
    return folder


def with_default(tensors):
    found = {}
    for key, tensor in tensors.items():
        for half in (".lora_A.weight", ".lora_B.weight"):
            key = key.replace(half, half.replace(".weight", ".default.weight"))
        found[key.replace("head.", "head.modules_to_save.default.")] = tensor
    return found


@pytest.mark.parametrize("change", [dict, with_default])
def test_the_pickle_of_old_adapters_is_read_without_running_it(change, tmp_path):
    model, x = trained(train_also="head"), ids()
    save(model, tmp_path)
    pickled(tmp_path, change)
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        assert find_format(path) is peft
        assert torch.equal(load(bare(), path)(x), model(x))


def test_a_pickle_is_not_read_where_there_is_more(tmp_path):
    save(trained(), tmp_path)
    torch.save(nn.Linear(2, 2), tmp_path / "adapter_model.bin")
    load(bare(), tmp_path)
    (tmp_path / SAFE).unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.bin .*It was not unpickled"):
        load(bare(), tmp_path)


def test_the_file_in_a_directory_stands_for_it(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path)
    assert torch.equal(load(bare(), tmp_path / SAFE)(x), model(x))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no file .*adapter_config\.json"):
        load(bare(), tmp_path / SAFE)


@pytest.mark.parametrize("name", ["embed", "q_proj"])
def test_default_in_the_keys_of_safetensors(name, tmp_path):
    model, x = bare(), ids()
    inject(model, name, r=2, alpha=3)
    randomize_adapters(model)
    save(model, tmp_path)
    tensors = load_file(tmp_path / SAFE)
    parts = [(f"lora_{x}.weight", f"lora_{x}.default.weight") for x in "AB"]
    parts += [(f"lora_embedding_{x}", f"lora_embedding_{x}.default") for x in "AB"]
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in parts:
            key = key.replace(old, new)
        renamed[key] = tensor
    assert all(".default" in key for key in renamed)
    save_file(renamed, tmp_path / SAFE)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))
    first = next(iter(renamed))
    save_file({**renamed, next(iter(tensors)): renamed[first] + 1}, tmp_path / SAFE)
    with pytest.raises(FormatError, match="are one place"):
        load(bare(), tmp_path)


def wrapped_names():
    """Modules that are called as PEFT calls its wrappers."""
    torch.manual_seed(0)
    linear = lambda: nn.Linear(4, 4)  # noqa: E731
    return nn.ModuleDict({
        "base_layer": nn.ModuleDict({"a": linear()}),
        "x": nn.ModuleDict({
            "base_layer": nn.ModuleDict({"a": linear(), "base_layer": linear()}),
            "modules_to_save": nn.ModuleDict({"head": linear(), "default": linear()}),
            "original_module": nn.ModuleDict({"head": linear()}),
        }),
    })  # fmt: skip


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_modules_that_are_called_like_wrappers(format, tmp_path):
    model = wrapped_names()
    in_full = ["x.modules_to_save.head", "x.original_module.head"]
    targets = ["a", "x.base_layer.base_layer", "x.modules_to_save.default"]
    inject(model, targets, r=2, alpha=3, bias="lora_only", train_also=in_full)
    randomize_adapters(model)
    x = torch.randn(3, 4)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            if "lora" not in name:
                p.add_(1)
    save(model, tmp_path / "a", format=format)
    convert(tmp_path / "a", tmp_path / "b", "peft")
    for folder in ("a", "b"):
        other = load(wrapped_names(), tmp_path / folder)
        found = {n: p for n, p in other.named_parameters() if p.requires_grad}
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], trained[name]) for name in trained)
        layer = other["x"]["base_layer"]["base_layer"]
        assert torch.equal(layer(x), model["x"]["base_layer"]["base_layer"](x))


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_proj", "base_layer", "default"])
@pytest.mark.parametrize("inner", ["lora_A", "lora_B", "modules_to_save", "lora_magnitude_vector"])
def test_what_trains_in_modules_that_are_called_like_parts_of_an_adapter(name, inner, tmp_path):
    """Adapted ones, one that trains in full, and biases: what was saved can be loaded."""

    def build():
        torch.manual_seed(0)
        layers = {inner: nn.Linear(4, 4), "weight": nn.Linear(4, 4), "head": nn.Linear(4, 4)}
        return nn.Sequential(nn.ModuleDict({name: nn.ModuleDict(layers)}))

    model = build()
    inject(model, [inner, f"{name}.weight"], r=2, bias="all", train_also="head")
    randomize_adapters(model)
    with torch.no_grad():
        for layer in model[0][name].values():
            layer.bias.add_(1)
    save(model, tmp_path)
    twin = build()
    load(twin, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a.base_layer.bias", "a.bias"),
        ("a.base_layer.base_layer.base_layer.up", "a.up"),
        ("x.base_layer.a.base_layer.weight", "x.base_layer.a.weight"),
        ("h.modules_to_save.default.weight", "h.weight"),
        ("h.modules_to_save.out.weight", "h.out.weight"),
        ("x.modules_to_save.head.modules_to_save.weight", "x.modules_to_save.head.weight"),
        ("h.original_module.weight", None),
        ("weight", "weight"),
        ("a" + ".base_layer" * 50 + ".bias", "a.bias"),
    ],
)
def test_names_without_wrappers(key, name):
    known = {"a.bias", "a.up", "x.base_layer.a.weight", "x.modules_to_save.head.weight"}
    names = Names(known | {"a", "x", "x.base_layer", "h", "h.weight", "h.out.weight"})
    assert names.tensor(f"base_model.model.{key}") == name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("how", ["safetensors", "pickle"])
def test_tensors_of_8_bits_are_cast_with_a_note(dtype, how, tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path)
    small = {key: t.to(dtype) for key, t in load_file(tmp_path / SAFE).items()}
    save_file({key: t.float() for key, t in small.items()}, tmp_path / SAFE)
    expected = load(bare(), tmp_path)(x)
    save_file(small, tmp_path / SAFE)
    if how == "pickle":
        pickled(tmp_path)
    with pytest.warns(LoRAInjectWarning, match=r"8 tensors are of float8_\w+, and are read as bf"):
        assert torch.equal(load(bare(), tmp_path)(x), expected)


def test_a_single_file_of_diffusers_is_one(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path, format="diffusers")
    file = tmp_path / "other.safetensors"
    (tmp_path / "pytorch_lora_weights.safetensors").rename(file)
    assert torch.equal(load(bare(), file)(x), model(x))
    save(model, tmp_path / "k.safetensors", format="kohya")
    assert find_format(tmp_path / "k.safetensors") is kohya


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_an_adapter_that_follows_16_bits_does_so_again(format, tmp_path):
    def base(dtype):
        return copy.deepcopy(bare()).to(dtype)

    for asked, kept in (("base", torch.bfloat16), (None, torch.float32)):
        model, x = base(torch.bfloat16), ids()
        inject(model, ["q_proj", "v_proj"], r=2, dtype=asked)
        randomize_adapters(model)
        save(model, tmp_path / "a", format=format)
        other = load(base(torch.bfloat16), tmp_path / "a")
        assert other.layers[0].q_proj.lora_A.dtype is kept
        assert torch.equal(other(x), model(x))
        wide = load(base(torch.float32), tmp_path / "a")
        assert wide.layers[0].q_proj.lora_A.dtype is torch.float32
        named = load(base(torch.bfloat16), tmp_path / "a", dtype=torch.float32)
        assert named.layers[0].q_proj.lora_A.dtype is torch.float32


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.v(self.q(x))


class Reads(Calls):
    def forward(self, x):
        return self.v(nn.functional.linear(x, self.q.weight, self.q.bias))


def test_dropout_that_cannot_act_is_left_out_with_a_warning(tmp_path):
    model, x = Calls(), torch.randn(3, 4)
    inject(model, ["q", "v"], r=2, dropout=0.1)
    randomize_adapters(model)
    save(model, tmp_path)
    other = Reads().eval()
    with pytest.warns(
        LoRAInjectWarning, match=r"q: the file has a dropout of 0\.1, and the adapter"
    ):
        load(other, tmp_path)
    torch.testing.assert_close(other(x), model.eval()(x))
    assert [m.lora_adapters[0].settings.dropout for m in (other.q, other.v)] == [0, 0.1]
