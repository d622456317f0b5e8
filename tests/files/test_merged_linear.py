"""Fused projections in the layout of loralib's ``MergedLinear``, both ways."""

import copy

import loralib
import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn

from lora_inject import ArgumentError, FormatError, inject, load, lora_state_dict, save
from lora_inject.files.convert import convert

pytestmark = pytest.mark.cpu("files are read on it")

ENABLED = [(True, False, True), (True, True, True), (False, True, False), (True, True)]


def base(parts):
    torch.manual_seed(0)
    return nn.ModuleDict({"qkv": nn.Linear(4, 6 * parts)})


def theirs(enabled):
    """loralib's model with the weights of the base and some adapter."""
    model = base(len(enabled))
    old, new = model["qkv"], loralib.MergedLinear(
        4, 6 * len(enabled), r=2, lora_alpha=6, enable_lora=list(enabled), merge_weights=False
    )  # fmt: skip
    new.load_state_dict(old.state_dict(), strict=False)
    model["qkv"] = new
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


def ours(enabled):
    model = base(len(enabled))
    names = ["qkv"[i] if on else None for i, on in enumerate(enabled)]
    inject(model, "qkv", r=2, alpha=6, parts={"qkv": names})
    return model


@pytest.mark.parametrize("enabled", ENABLED)
def test_loralibs_files_are_read_into_the_parts(enabled, tmp_path):
    other, x = theirs(enabled), torch.randn(3, 4)
    torch.save(loralib.lora_state_dict(other), tmp_path / "a.pt")
    model = ours(enabled)
    names = set(lora_state_dict(model))
    load(model, tmp_path / "a.pt", alpha=6)
    assert set(lora_state_dict(model)) == names
    torch.testing.assert_close(model["qkv"](x), other["qkv"](x))


@pytest.mark.parametrize("enabled", ENABLED)
def test_loralib_reads_ours(enabled, tmp_path):
    model, x = ours(enabled), torch.randn(3, 4)
    randomize_adapters(model)
    save(model, tmp_path / "a.pt", format="loralib")
    other = theirs(enabled)
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(other["qkv"](x), model["qkv"](x))
    again = load(ours(enabled), tmp_path / "a.pt", alpha=6)
    assert torch.equal(again["qkv"](x), model["qkv"](x))


def test_which_parts_is_told_by_a_model_or_by_there_being_all(tmp_path):
    some, every = tmp_path / "some.pt", tmp_path / "every.pt"
    torch.save(loralib.lora_state_dict(theirs((True, False, True))), some)
    other, x = theirs((True, True, True)), torch.randn(3, 4)
    torch.save(loralib.lora_state_dict(other), every)
    model = base(3)
    before = snapshot(model)
    with pytest.raises(
        FormatError, match=r"qkv: the file adapts 2 parts .* Inject first, as parts="
    ):
        load(model, some, alpha=6)
    with pytest.raises(ArgumentError, match="told by its model alone"):
        convert(some, tmp_path / "a", "peft", alpha=6)
    with pytest.raises(ArgumentError, match="Load it there"):
        convert(some, tmp_path / "a", "peft", model=model, alpha=6)
    assert changed_parts(before, snapshot(model)) == []
    torch.testing.assert_close(load(model, every, alpha=6)["qkv"](x), other["qkv"](x))
    mixed = ours((True, False, True))
    with pytest.raises(FormatError):
        load(mixed, every, alpha=6)


@pytest.mark.parametrize("parts", [("q", ("k", 4), ("v", 8)), (("q", 4), (None, 2), ("v", 4))])
def test_parts_that_merged_linear_does_not_have_are_refused(parts, tmp_path):
    total = sum(size for _, size in [p if isinstance(p, tuple) else (p, 6) for p in parts])
    model = nn.ModuleDict({"qkv": nn.Linear(4, total)})
    sized = tuple(p if isinstance(p, tuple) else (p, 6) for p in parts)
    inject(model, "qkv", r=2, parts={"qkv": sized})
    with pytest.raises(FormatError, match=r'qkv: .* equal ones\. Save it as "peft"'):
        save(model, tmp_path / "a.pt", format="loralib")
    save(copy.deepcopy(model), tmp_path / "a")
