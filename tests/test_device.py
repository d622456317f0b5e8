"""What holds on any device: ``pytest --device cuda`` runs it, and much of the suite, on a GPU."""

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, llama
from helpers import Net, changed_parts, ids, raw, snapshot, train_steps

from lora_inject import inject, load, lora_parameters, merge, save, strip, unmerge


def test_everything_stays_on_the_device_and_no_value_depends_on_it(device, tmp_path):
    torch.manual_seed(0)
    model, elsewhere = Net().to(device), Net().to("cpu")
    elsewhere.load_state_dict(model.state_dict())
    before = snapshot(model)
    for each in (model, elsewhere):
        inject(each, ["q_proj", "embed"], r=2, seed=1, bias="lora_only", train_also="head")
    values = {key: raw(value) for key, value in model.state_dict().items()}
    assert values == {key: raw(value) for key, value in elsewhere.state_dict().items()}
    train_steps(model, ids())
    merge(model)
    unmerge(model)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    save(model, tmp_path / "adapter")
    on = model(ids(1, 11))
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    load(model, tmp_path / "adapter")
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    assert on.shape == (1, 11, 3)


def test_a_model_that_moves_takes_its_adapters_along(device):
    model = llama().to("cpu")
    base = {key: raw(value) for key, value in model.state_dict().items()}
    inject(model, ["q_proj", "v_proj"], r=2)
    model.to(device)
    assert {p.device.type for p in lora_parameters(model)} == {device.type}
    train_steps(model, FAMILIES["llama"].inputs())
    model.to("cpu")
    strip(model)
    assert {key: raw(value) for key, value in model.state_dict().items()} == base


@pytest.mark.cpu("it is about machines without a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the tests run on it")
def test_device_cuda_is_skipped_with_a_reason_where_there_is_no_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda"]
    done = subprocess.run(
        [*command, f"{__file__}::{test_a_model_that_moves_takes_its_adapters_along.__name__}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--device cuda: there is no GPU here" in done.stdout
    assert "1 skipped" in done.stdout
