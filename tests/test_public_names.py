"""The package itself: its names are found where they stand, and nothing is imported before."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lora_inject
from lora_inject.own import Model


def test_type_checkers_and_the_interpreter_find_each_name_in_one_place():
    tree = ast.parse(Path(lora_inject.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    checked = {
        alias.name: node.module.removeprefix("lora_inject.")
        for node in block.body
        for alias in node.names
    }
    assert checked == lora_inject._HOME
    assert sorted(checked) == sorted(lora_inject.__all__)


@pytest.mark.parametrize("name", lora_inject.__all__)
def test_a_name_is_what_its_module_has_and_no_module(name):
    value = getattr(lora_inject, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(import_module(f"lora_inject.{lora_inject._HOME[name]}"), name)
    assert name in dir(lora_inject)


@pytest.mark.parametrize(
    "name", ["load", "load_lora_state_dict", "strip", "unmerge", "use", "remove"]
)
def test_what_gives_its_model_back_is_typed_to(name):
    types = getattr(lora_inject, name).__annotations__
    assert types["model"] is types["return"] is Model


def test_a_name_that_is_not_there_is_said():
    with pytest.raises(AttributeError, match="lora_inject"):
        lora_inject.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import lora_inject; assert 'torch' not in sys.modules and 'inject' in dir(lora_inject)",
        "import lora_inject.inject; from lora_inject import inject; assert callable(inject)",
        "from lora_inject.plan import plan as p; from lora_inject import plan; assert p is plan",
        "from lora_inject import report; import lora_inject.report.report; "
        "assert lora_inject.report is report and callable(report)",
        "from lora_inject import inject; assert 'lora_inject.files' not in sys.modules",
        "from lora_inject import *; assert callable(save)",
    ],
)
def test_whatever_is_imported_first(code):
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True, timeout=120)
