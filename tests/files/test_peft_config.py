"""``adapter_config.json``: what it says besides is said again, and how it may be written."""

import copy
import json

import pytest
from helpers import PEFT_WARNS
from stored_models import bare, trained

from lora_inject import inject, load, merge, save, unmerge, use
from lora_inject.files.convert import convert

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
