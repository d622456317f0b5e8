"""Files changed at random: an error of ours, or an adapter that can be stripped; never more.

``--examples 5000`` looks longer.
"""

import contextlib
import json
import re
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from fuzzed import changed_file
from helpers import changed_parts, examples, ids, snapshot, train_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_models import bare, trained

from lora_inject import (
    FormatError,
    LoRAInjectError,
    calibrate,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    save,
    strip,
)
from lora_inject.calibration.statistics import Statistics
from lora_inject.core.expressions import Expression, Limits
from lora_inject.core.travelling import ENTRY, as_entry
from lora_inject.files.convert import inspect
from lora_inject.files.formats.peft_patterns import Patterns
from lora_inject.files.formats.storage import read_pickled, read_tensors
from lora_inject.integrations.trained import require_trained, trained_tensors
from lora_inject.starts.original import Original

pytestmark = pytest.mark.cpu("files are read on it")


def adapter(**options):
    torch.manual_seed(0)
    model = bare()
    inject(model, ["q_proj", "v_proj"], r=2, alpha=3, **options)
    train_steps(model, ids())
    return model


# By name: what makes the model, and the arguments of save.
SOURCES = {
    "peft": (lambda: trained("lora_only", train_also="head"), {}),
    "peft, in parts": (lambda: adapter(parts={"v_proj": ("k", None)}, dropout=0.1), {}),
    "peft, dora": (lambda: adapter(variant="dora", fixed="A"), {}),
    "peft, loha": (lambda: adapter(variant="loha"), {}),
    "peft, lokr": (lambda: adapter(variant="lokr"), {}),
    "peft, rows": (lambda: adapter(rows={"embed": [3, 5]}), {}),
    "peft, pissa": (lambda: adapter(init="pissa"), {}),
    "peft, pickled": (trained, {}),
    "loralib": (lambda: trained("all"), {"format": "loralib"}),
    "kohya": (trained, {"format": "kohya"}),
    "kohya, dora": (lambda: adapter(variant="dora"), {"format": "kohya"}),
    "kohya, lokr": (lambda: adapter(variant="lokr"), {"format": "kohya"}),
    "diffusers": (trained, {"format": "diffusers"}),
}
SINGLE = {"loralib": "adapter.pt", "kohya": "adapter.safetensors"}


def path_in(folder, source):
    """The path that is saved to and loaded from."""
    return folder / SINGLE.get(SOURCES[source][1].get("format"), "")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of every file of every source, by name."""
    made = {}
    for source, (make, options) in SOURCES.items():
        folder = tmp_path_factory.mktemp("source")
        save(make(), path_in(folder, source), **options)
        if "pickled" in source:
            tensors, _ = read_tensors(folder / "adapter_model.safetensors")
            torch.save(tensors, folder / "adapter_model.bin")
            (folder / "adapter_model.safetensors").unlink()
        read = (file for file in sorted(folder.iterdir()) if file.suffix != ".md")  # by people
        made[source] = {file.name: file.read_bytes() for file in read}
    return made


def attempt(source, files, random):
    """Change files, and load them: the model has the adapter, or is as it was."""
    own, model = dict(files[source]), bare()
    for name in random.choice([*([name] for name in own), list(own)]):
        own[name] = changed_file(random, name, own[name])
    before = snapshot(model)
    options = {"alpha": 3} if source == "loralib" else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(LoRAInjectError):
        for name, content in own.items():
            (Path(folder) / name).write_bytes(content)
        path = path_in(Path(folder), source)
        with contextlib.suppress(LoRAInjectError):
            str(inspect(path))
        load(model, path, other_base=random.random() < 0.5, **options)
        model(ids())
        strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=examples(0.3))
@given(random=st.randoms(use_true_random=False))
def test_a_changed_file_is_refused_by_us_or_loads(source, files, random):
    attempt(source, files, random)


# --- what is read besides adapters ---------------------------------------------------------------


def resume(model, path):
    """What the callbacks for trainers do with a checkpoint."""
    tensors, _ = read_tensors(path)
    require_trained(model, {key: t for key, t in tensors.items() if key != ENTRY})
    model.load_state_dict(tensors, strict=False)


def checkpoint(path):
    model = trained("lora_only", train_also="head")
    tensors = {**trained_tensors(model), ENTRY: as_entry(model)}
    save_file(tensors, path, metadata={"format": "pt"})


def statistics(path):
    calibrate(bare(), "q_proj", [ids()], progress=False).save(path)


def original(model, path):
    """The weights from before a quantization."""
    found = Original(path)
    for name in bare().state_dict():
        if name in found and found.shape(name):
            found.tensor(name)


def base(path):
    save_file(bare().state_dict(), path)


def state_dict(model, path):
    load_lora_state_dict(model, read_pickled(path))


# By name: the file, what makes it, what reads it into which model.
OTHERS = {
    "checkpoint": ("a.safetensors", checkpoint, resume,
                   lambda: trained("lora_only", train_also="head", seed=1)),
    "statistics": ("a.safetensors", statistics, lambda _, path: str(Statistics.load(path)), bare),
    "original": ("a.safetensors", base, original, bare),
    "state dict": ("a.pt", lambda path: torch.save(dict(lora_state_dict(trained("all"))), path),
                   state_dict, lambda: trained("all", seed=1)),
}  # fmt: skip


def attempt_other(name, random):
    """Change a file, and read it: the model has its values, or is as it was."""
    file, make, read, build = OTHERS[name]
    model = build()
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        make(path)
        path.write_bytes(changed_file(random, file, path.read_bytes()))
        try:
            read(model, path)
        except LoRAInjectError:
            assert changed_parts(before, snapshot(model)) == []
        else:
            assert set(changed_parts(before, snapshot(model))) <= {"state", "buffers"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=examples(0.3))
@given(random=st.randoms(use_true_random=False))
def test_so_is_any_other_file(name, random):
    attempt_other(name, random)


def test_reading_takes_no_more_memory_than_the_file_has(tmp_path):
    """What says that it is larger than it is, or would be written out, is refused before."""
    resource = pytest.importorskip("resource")
    save(trained(), tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    whole, before = tensors.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    claims = json.dumps({"x.lora_A.weight": {"dtype": "F32", "shape": [2**40], "data_offsets":
                                             [0, 2**42]}}).encode()  # fmt: skip
    patterns = {"(((a{99}){99}){99}){99}": 2, "(?R)": 2, "a{99999999}": 2}
    for pattern, content in [
        *((pattern, whole) for pattern in patterns),
        ("q_proj", (2**62).to_bytes(8, "little") + b"{}"),
        ("q_proj", (2**26).to_bytes(8, "little") + b" " * 2**16),
        ("q_proj", len(claims).to_bytes(8, "little") + claims),
    ]:
        text = json.loads(config.read_text()) | {"rank_pattern": {pattern: 2}}
        config.write_text(json.dumps(text))
        tensors.write_bytes(content)
        with pytest.raises(FormatError):
            load(bare(), tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024  # kilobytes; each of these would take gigabytes


def test_a_pickled_file_holds_no_more_than_it_has(tmp_path):
    """One of a few kilobytes could be of any size: with strides of zero, or compressed."""
    A, B = "layers.0.q_proj.lora_A", "layers.0.q_proj.lora_B"
    many = torch.ones(1).expand(2, 2**34)  # four minutes to look at, once loaded
    torch.save({A: many, B: torch.ones(8, 2)}, tmp_path / "a.pt")
    torch.save({A: torch.zeros(2, 2**16), B: torch.ones(8, 2)}, tmp_path / "plain.pt")
    with (zipfile.ZipFile(tmp_path / "plain.pt") as plain,
          zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as compressed):  # fmt: skip
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    for name, message in (("a.pt", "larger than the values"), ("b.pt", "compressed")):
        with pytest.raises(FormatError, match=message):
            load(bare(), tmp_path / name, alpha=2)
    flat = torch.randn(64)  # views of one buffer, as optimizers have them, are as large as it is
    torch.save({A: flat[:16].view(2, 8), B: flat[16:32].view(8, 2)}, tmp_path / "c.pt")
    load(bare(), tmp_path / "c.pt", alpha=2)


def test_errors_show_what_a_file_holds_shortly_and_printably(tmp_path):
    tensors = {"base_model.model.\x1b[2J\n" + "x" * 5000 + ".lora_A.weight": torch.ones(2, 8)}
    save(trained(), tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError) as caught:
        load(bare(), tmp_path)
    assert len(str(caught.value)) < 2000
    assert r"\x1b[2J" in str(caught.value)


def test_a_rank_for_every_layer_is_looked_up(tmp_path):
    """Where every layer has an expression of its own, they were all tried for all layers."""
    layers = 300
    model = torch.nn.ModuleDict({f"block_{i}": torch.nn.Linear(2, 2) for i in range(layers)})
    tensors = {}
    for i in range(layers):
        tensors[f"block_{i}.lora_A.weight"] = torch.ones(1 + i % 2, 2)
        tensors[f"block_{i}.lora_B.weight"] = torch.ones(2, 1 + i % 2)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expression, "matches", lambda *_: pytest.fail("no look-up"))
        load(model, tmp_path)
    assert [layer.lora_adapters[0].settings.r for layer in model.values()] == [1, 2] * (layers // 2)


def test_the_first_pattern_that_matches_decides_names_or_not():
    values = {"^a\\.b": 1, ".*c": 2, "b": 3, "c": 4, "^b": 5, "\\^b": 6, "d|e": 7}
    found = Patterns(values, Path("x"), Limits())
    expected = {"a.b": 1, "x.a.b": 3, "c": 2, "x.c": 2, "b": 3, "x.^b": 6, "xb": 0, "d": 7, "": 0}
    assert {path: found.find(path, 0) for path in expected} == expected
    for path in expected:
        wholes = (value for text, value in values.items()
                  if re.fullmatch(rf"(.*\.)?({text})", path))  # fmt: skip
        assert found.find(path, 0) == next(wholes, 0)
