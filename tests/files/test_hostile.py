"""Hostile files: each gives one clear error, leaves the model alone and runs nothing."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import changed_parts, snapshot
from stored_models import SAFE, bare, trained

from lora_inject import FormatError, load, lora_state_dict, save
from lora_inject.files.formats.storage import read_tensors, write_tensors

pytestmark = pytest.mark.cpu("files are read on it")

CONFIG = "adapter_config.json"
RAN = []


class Payload:
    """What unpickling would run."""

    def __reduce__(self):
        return (RAN.append, ("ran",))


@pytest.fixture
def folder(tmp_path):
    save(trained("lora_only", train_also="head"), tmp_path)
    return tmp_path


def without_metadata(folder, change):
    """The tensors changed by a function, in a file as PEFT would write it."""
    tensors, _ = read_tensors(folder / SAFE)
    change(tensors)
    write_tensors(tensors, folder / SAFE, {"format": "pt"})


def with_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    without_metadata(folder, lambda tensors: None)


def with_header(folder, header):
    text = json.dumps(header).encode()
    (folder / SAFE).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)


def truncated(folder):
    whole = (folder / SAFE).read_bytes()
    (folder / SAFE).write_bytes(whole[: len(whole) // 2])


def wrong_magic(folder):
    (folder / SAFE).write_bytes(b"PK\x03\x04" + b"\0" * 500)


def empty(folder):
    (folder / SAFE).write_bytes(b"")


def longer_than_the_file(folder):
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    with_header(folder, {"base_model.model.x.lora_A.weight": entry})


def a_header_of_the_size_of_memory(folder):
    (folder / SAFE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def overlapping(folder):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with_header(folder, {"a": entry, "b": entry})


def a_million_keys(folder):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    with_header(folder, {f"x{i}.lora_A.weight": entry for i in range(1_000_000)})


def nan(folder):
    without_metadata(folder, lambda t: next(iter(t.values())).fill_(float("nan")))


def inf_in_a_bias(folder):
    key = "base_model.model.layers.0.q_proj.base_layer.bias"
    without_metadata(folder, lambda t: t[key].fill_(float("inf")))


def names_with_path_traversal(folder):
    key = "base_model.model.../../../../etc/passwd.lora_A.weight"
    without_metadata(
        folder,
        lambda t: t.update({key: torch.ones(2, 8), key.replace("_A", "_B"): torch.ones(8, 2)}),
    )


def half_a_pair(folder):
    without_metadata(folder, lambda t: t.pop("base_model.model.layers.0.q_proj.lora_B.weight"))


def a_missing_layer(folder):
    for letter in "AB":
        key = f"base_model.model.layers.0.q_proj.lora_{letter}.weight"
        without_metadata(folder, lambda t, key=key: t.pop(key))
    without_metadata(folder, lambda t: t.pop("base_model.model.head.weight"))


def no_tensors(folder):
    without_metadata(folder, lambda t: t.clear())


def shapes_that_do_not_multiply(folder):
    key = "base_model.model.layers.0.q_proj.lora_B.weight"
    without_metadata(folder, lambda t: t.update({key: torch.ones(8, 5)}))


def a_scalar_for_a_matrix(folder):
    key = "base_model.model.layers.0.q_proj.lora_B.weight"
    without_metadata(folder, lambda t: t.update({key: torch.tensor(1.0)}))


def integers_for_values(folder):
    key = "base_model.model.layers.0.q_proj.lora_A.weight"
    without_metadata(folder, lambda t: t.update({key: torch.ones(2, 8, dtype=torch.int64)}))


def an_absurd_rank(folder):
    with_config(folder, r=10**18)


def a_rank_that_is_no_number(folder):
    with_config(folder, r="8; rm -rf /")


def an_infinite_alpha(folder):
    with_config(folder, lora_alpha=1e999)


def a_bomb_in_a_pattern(folder):
    with_config(folder, rank_pattern={"(" * 3000 + "a*" + ")*" * 3000 + "!": 2})


def a_pattern_that_does_not_compile(folder):
    with_config(folder, alpha_pattern={"(q_proj": 2})


def a_dropout_above_one(folder):
    with_config(folder, lora_dropout=3)


def an_unknown_bias_mode(folder):
    with_config(folder, bias="some")


def no_json(folder):
    (folder / CONFIG).write_text("{not json")


def nested_json(folder):
    (folder / CONFIG).write_text("[" * 100_000)


def json_of_another_type(folder):
    (folder / CONFIG).write_text("[1, 2]")


def binary_json(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")


def no_config(folder):
    (folder / CONFIG).unlink()


def a_directory_for_the_config(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


def a_directory_for_the_tensors(folder):
    (folder / SAFE).unlink()
    (folder / SAFE).mkdir()


def a_pickle_for_the_tensors(folder):
    (folder / SAFE).write_bytes(pickle.dumps(Payload()))


def a_pickle_beside(folder):
    (folder / SAFE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


def broken_own_metadata(folder):
    tensors, _ = read_tensors(folder / SAFE)
    write_tensors(tensors, folder / SAFE, {"format": "pt", "lora_inject": "{"})


def own_metadata_of_another_type(folder):
    tensors, metadata = read_tensors(folder / SAFE)
    own = {**json.loads(metadata["lora_inject"]), "parts": {"layers.0.q_proj": 5}}
    write_tensors(tensors, folder / SAFE, {"lora_inject": json.dumps(own)})


def own_metadata_that_is_wrong_everywhere(folder):
    tensors, _ = read_tensors(folder / SAFE)
    own = {"parts": [1], "dropout": 5, "targets": 3, "train_also": {"a": 1}, "base": [2]}
    write_tensors(tensors, folder / SAFE, {"lora_inject": json.dumps(own)})


BREAKS = [value for value in list(globals().values())
          if callable(value) and getattr(value, "__module__", "") == __name__
          and getattr(value, "__code__", None) and value.__code__.co_varnames[:1] == ("folder",)
          and value.__name__ not in ("without_metadata", "with_config", "with_header")]  # fmt: skip


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("into", ["bare", "filled"])
def test_damaged_directories(damage, into, folder):
    damage(folder)
    model = bare() if into == "bare" else trained("lora_only", train_also="head")
    before = snapshot(model)
    started = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        load(model, folder, format="peft")
    assert time.perf_counter() - started < 30
    assert 20 < len(str(caught.value)) < 2000
    assert changed_parts(before, snapshot(model)) == []
    assert RAN == []


def test_pickles_with_a_payload(tmp_path):
    torch.save({"layers.0.q_proj.lora_A": Payload()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"x": Payload()}))
    (tmp_path / "c.pt").write_bytes(b"garbage")
    torch.save([torch.ones(1)], tmp_path / "d.pt")
    torch.save({"x": {"y": torch.ones(1)}}, tmp_path / "e.pt")
    model = bare()
    before = snapshot(model)
    for name in "abcde":
        with pytest.raises(FormatError, match=f"{name}.pt"):
            load(model, tmp_path / f"{name}.pt")
    assert RAN == []
    assert changed_parts(before, snapshot(model)) == []


def test_targets_that_cannot_be_written(tmp_path):
    model = trained()
    (tmp_path / "file").write_text("mine")
    for target, format in (("file", "peft"), ("file/inside", "peft"), ("file/a.pt", "loralib"),
                           ("", "loralib"), ("", "kohya"), ("file", "diffusers")):  # fmt: skip
        with pytest.raises(FormatError, match=r"cannot be written to|is a directory"):
            save(model, tmp_path / target, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


DYING = """
import os, sys
from pathlib import Path
import safetensors.torch
from lora_inject import save
from stored_models import trained

def dying(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), 9)

safetensors.torch.save_file = dying
save(trained(seed=1), sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="a signal ends the process")
def test_a_killed_save_leaves_the_former_files(tmp_path):
    """The process dies while the tensors are being written."""
    model = trained()
    save(model, tmp_path)
    command = [sys.executable, "-c", DYING, str(tmp_path)]
    tests = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(tests.parent)}  # the copy that is tested
    ended = subprocess.run(command, cwd=tests, env=env, timeout=120, check=False)
    assert ended.returncode == -9
    expected, loaded = lora_state_dict(model), lora_state_dict(load(bare(), tmp_path))
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_pointer_of_git_lfs_is_said_to_be_one(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    for name in (SAFE, CONFIG):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(pointer)
        with pytest.raises(FormatError, match=rf"{name} is a pointer of git-lfs.*Run git lfs pull"):
            load(bare(), folder)
        (folder / name).write_bytes(whole)


def test_the_tensors_inside_of_a_directory_load_and_by_another_name_say_what_to_give(folder):
    assert lora_state_dict(load(bare(), folder / SAFE))
    (folder / SAFE).rename(folder / "other.safetensors")
    with pytest.raises(FormatError, match=r"has the keys of PEFT.*Give the directory"):
        load(bare(), folder / "other.safetensors")
