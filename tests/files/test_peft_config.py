"""``adapter_config.json``: what it says besides is said again, and how it may be written."""

import copy
import json

import pytest
import torch
from helpers import PEFT_WARNS, changed_parts, ids, snapshot
from safetensors.torch import save_file
from stored_models import SAFE, bare, trained
from torch import nn

from lora_inject import FormatError, inject, load, merge, save, strip, unmerge, use
from lora_inject.files.convert import convert
from lora_inject.files.formats.storage import read_tensors, write_tensors

pytestmark = [PEFT_WARNS, pytest.mark.cpu("files are read on it")]

CONFIG = "adapter_config.json"


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def with_config(folder, **changes):
    """Our file with other entries in its config; None takes one out."""
    save(trained(), folder)
    config = {k: v for k, v in {**config_of(folder), **changes}.items() if v is not None}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def without_metadata(folder):
    """The file as PEFT would have written it."""
    write_tensors(read_tensors(folder / SAFE)[0], folder / SAFE, {"format": "pt"})
    return folder


BESIDES = {
    "auto_mapping": {"base_model_class": "Net", "parent_library": "helpers"},
    "task_type": "SEQ_CLS",
    "revision": "v2",
    "base_model_name_or_path": "some/net",
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("adapter", ["default", "fr"])
def test_what_a_config_says_besides_is_said_again(adapter, tmp_path):
    model = load(bare(), with_config(tmp_path / "a", **BESIDES), adapter=adapter)
    use(model)
    use(model, adapter)
    merge(model)
    unmerge(model)
    save(copy.deepcopy(model), tmp_path / "b", adapter=adapter)
    assert {key: config_of(tmp_path / "b")[key] for key in BESIDES} == BESIDES
    convert(tmp_path / "a", tmp_path / "c", "diffusers", format="peft")
    convert(tmp_path / "c", tmp_path / "d", "peft")
    assert {key: config_of(tmp_path / "d")[key] for key in BESIDES} == BESIDES


def test_what_is_not_so_of_the_model_any_more_is_not_said(tmp_path):
    class Other(type(bare())):
        name_or_path = "another/net"

    model = Other()
    save(load(model, with_config(tmp_path / "a", **BESIDES), other_base=True), tmp_path / "b")
    config = config_of(tmp_path / "b")
    assert config["base_model_name_or_path"] == "another/net"
    assert not {"revision", "auto_mapping"} & config.keys()
    assert config["task_type"] == "SEQ_CLS"


def test_nothing_is_said_of_an_adapter_that_was_not_loaded(tmp_path):
    model = load(bare(), with_config(tmp_path / "a", **BESIDES), adapter="fr")
    inject(model, "q_proj", r=2, adapter="de")
    save(model, tmp_path / "b", adapter="de")
    assert not {"revision", "auto_mapping"} & config_of(tmp_path / "b").keys()


@pytest.mark.parametrize("changes", [
    {"r": "2"}, {"lora_alpha": "3"}, {"lora_dropout": "0.0"}, {"lora_alpha": " 3.0 "},
    {"rank_pattern": {"q_proj": "2"}, "r": "9", "alpha_pattern": {"v_proj": "3"}, "lora_alpha": 3},
])  # fmt: skip
def test_numbers_that_are_written_as_strings(changes, tmp_path):
    if "rank_pattern" in changes:
        changes = {**changes, "rank_pattern": {"q_proj": "2", "v_proj": "2"}}
    save(trained(), tmp_path / "a")
    x = ids()
    expected = load(bare(), tmp_path / "a")(x)
    without_metadata(with_config(tmp_path / "a", **changes))
    assert torch.equal(load(bare(), tmp_path / "a")(x), expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"r": "two"}, "rank 'two'"), ({"lora_alpha": "nan"}, "alpha of"),
    ({"lora_dropout": "half"}, "lora_dropout must be a number"),
    ({"use_rslora": "false"}, "use_rslora must be true or false"),
    ({"use_dora": "false"}, "use_dora must be true or false"),
    ({"enable_lora": [1, 0]}, "enable_lora must be a list"),
    ({"enable_lora": [False]}, "enable_lora must be a list"),
    ({"enable_lora": "q"}, "enable_lora must be a list"),
])  # fmt: skip
def test_strings_and_lists_that_are_no_such_values(changes, message, tmp_path):
    without_metadata(with_config(tmp_path, **changes))
    with pytest.raises(FormatError, match=message):
        load(bare(), tmp_path)


def test_a_byte_order_mark_in_front_of_the_config(tmp_path):
    save(trained(), tmp_path)
    text = (tmp_path / CONFIG).read_text(encoding="utf-8")
    (tmp_path / CONFIG).write_bytes(b"\xef\xbb\xbf" + text.encode())
    x = ids()
    assert torch.equal(load(bare(), tmp_path)(x), trained()(x))


@pytest.mark.parametrize("name", ["mica", "MiCA"])
def test_the_factor_that_a_start_keeps_stays_fixed(name, tmp_path):
    without_metadata(with_config(tmp_path / "a", init_lora_weights=name))
    model = load(bare(), tmp_path / "a")
    x = ids()
    assert torch.equal(model(x), trained()(x))
    layer = model.layers[0].q_proj
    assert layer.lora_A.requires_grad
    assert not layer.lora_B.requires_grad
    save(model, tmp_path / "b")
    assert not load(bare(), tmp_path / "b").layers[0].q_proj.lora_B.requires_grad


def test_a_file_of_peft_with_the_start_of_mica(tmp_path):
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="mica")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            assert "lora_A" in name
            nn.init.normal_(p)
    theirs.eval().save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    before = snapshot(base)
    torch.testing.assert_close(load(base, tmp_path)(x), theirs(x))
    assert not base[0].lora_B.requires_grad
    strip(base)
    assert changed_parts(before, snapshot(base)) == []


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True], [False, True]])
def test_fused_projections_of_the_first_peft(enabled, tmp_path):
    n, r, parts = sum(enabled), 2, len(enabled)
    A, B = torch.randn(n * r, 4), torch.randn(n * 6, r, 1)
    tensors = {"base_model.model.qkv.lora_A.weight": A, "base_model.model.qkv.lora_B.weight": B}
    save_file(tensors, tmp_path / SAFE)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": ["qkv"],
              "enable_lora": enabled, "merge_weights": False, "fan_in_fan_out": False}  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model, x = nn.ModuleDict({"qkv": nn.Linear(4, 6 * parts)}), torch.randn(3, 4)
    layer = model["qkv"]
    expected = layer(x).clone()
    for i, part in enumerate([i for i, on in enumerate(enabled) if on]):
        a, b = A[i * r : (i + 1) * r], B[i * 6 : (i + 1) * 6, :, 0]
        expected[:, part * 6 : (part + 1) * 6] += 3 * (x @ a.T @ b.T)
    load(model, tmp_path)
    torch.testing.assert_close(layer(x), expected)
    strip(model)
    names = [f"x{i}" if on else None for i, on in enumerate(enabled)]
    inject(model, "qkv", r=r, alpha=6, parts={"qkv": names})
    load(model, tmp_path)
    torch.testing.assert_close(layer(x), expected)
    for wrong in ([True, True, True, True], [True] + [False] * 4 if n > 1 else [True] * 5):
        (tmp_path / CONFIG).write_text(json.dumps({**config, "enable_lora": wrong}))
        with pytest.raises(FormatError, match="qkv"):
            load(nn.ModuleDict({"qkv": nn.Linear(4, 6 * parts)}), tmp_path)
