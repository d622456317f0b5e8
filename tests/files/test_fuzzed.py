"""Files changed at random: an error of ours, or an adapter that can be stripped; never more.

``--examples 5000`` looks longer.
"""

import contextlib
import tempfile
from pathlib import Path

import pytest
import torch
from fuzzed import changed_file
from helpers import changed_parts, ids, snapshot, train_steps
from hypothesis import given
from hypothesis import strategies as st
from stored_models import bare, trained

from lora_inject import LoRAInjectError, inject, load, save, strip
from lora_inject.files.convert import inspect
from lora_inject.files.formats.storage import read_tensors

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
        made[source] = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
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
@given(random=st.randoms(use_true_random=False))
def test_a_changed_file_is_refused_by_us_or_loads(source, files, random):
    attempt(source, files, random)
