"""Values that changed in a file since it was saved are refused by name, where it has digests."""

import json
import struct

import pytest
import torch
from helpers import changed_parts, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_models import SAFE, bare, trained

from lora_inject import FormatError, load, lora_state_dict, save
from lora_inject.files.formats.digests import DIGESTS
from lora_inject.files.formats.storage import read_tensors, write_tensors

pytestmark = pytest.mark.cpu("files are read on it")

# By format: where its tensors are, below what was saved.
FILES = {
    "peft": SAFE,
    "diffusers": "pytorch_lora_weights.safetensors",
    "kohya": "a.safetensors",
    "loralib": "a.pt",
}


def saved(format, folder):
    """The adapter in this format: what to load, and the file with its tensors."""
    path = folder if format in ("peft", "diffusers") else folder / FILES[format]
    save(trained(), path, format=format)
    return path, folder / FILES[format]


def flip(file, at):
    """Change one bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("format", FILES)
def test_a_flipped_bit_is_refused_and_changes_nothing(format, tmp_path):
    path, file = saved(format, tmp_path)
    alpha = 3 if format == "loralib" else None
    load(bare(), path, alpha=alpha)
    if format == "loralib":  # an archive, with a checksum of each tensor
        values = lora_state_dict(trained())["layers.1.v_proj.lora_B"]
        at = file.read_bytes().index(values.contiguous().numpy().tobytes())
    else:
        at = file.stat().st_size - 4  # the lowest bits of the last number
    flip(file, at)
    model = bare()
    before = snapshot(model)
    with pytest.raises(FormatError, match=r"damaged: .* (values than were|not what was) saved"):
        load(model, path, alpha=alpha)
    assert changed_parts(before, snapshot(model)) == []


def test_archives_without_checksums_load_as_before(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path, _ = saved("loralib", tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    load(bare(), path, alpha=3)
    torch.save(lora_state_dict(trained()), path, _use_new_zipfile_serialization=False)
    load(bare(), path, alpha=3)


def test_the_damaged_tensor_is_named(tmp_path):
    path, file = saved("peft", tmp_path)
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    name = "base_model.model.layers.0.v_proj.lora_A.weight"
    flip(file, 8 + length + header[name]["data_offsets"][0])
    with pytest.raises(FormatError, match=f"damaged: {name} have other values than were saved"):
        load(bare(), path)


def test_files_without_digests_load_as_before(tmp_path):
    path, file = saved("peft", tmp_path)
    metadata = {key: value for key, value in metadata_of(file).items() if key != DIGESTS}
    save_file(load_file(file), file, metadata=metadata)
    flip(file, file.stat().st_size - 4)
    load(bare(), path)


@pytest.mark.parametrize("change", [lambda t: t.half(), lambda t: torch.cat([t, t])])
def test_what_another_tool_has_written_in_another_form_is_not_compared(change, tmp_path):
    _, file = saved("kohya", tmp_path)
    tensors = {name: change(t) if t.dim() else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata=metadata_of(file))
    assert read_tensors(file)[0].keys() == tensors.keys()


@pytest.mark.parametrize("digests", ["{", "[]", '{"a": 1}', '{"a": ["x"]}', "3"])
def test_digests_that_cannot_be_read_are_one_error(digests, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={DIGESTS: digests})
    with pytest.raises(FormatError, match="the digests in its metadata cannot be read"):
        read_tensors(tmp_path / "a.safetensors")


def test_tensors_of_every_kind_have_one(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5), "empty": torch.ones(0, 3), "bool": torch.tensor([True, False]),
        "bf16": torch.ones(2, 2, dtype=torch.bfloat16).T, "complex": torch.ones(2) * 1j,
    }  # fmt: skip
    write_tensors(tensors, tmp_path / "a.safetensors", {})
    assert json.loads(metadata_of(tmp_path / "a.safetensors")[DIGESTS]).keys() == tensors.keys()
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert metadata == {}
