"""Without torch's private names everything is slower at most: never wrong, and never no import."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from products import I, R, gradients, layer, make, plain
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_inject
from lora_inject import inject
from lora_inject.arithmetic import linear as ways
from lora_inject.compat import torch_private
from lora_inject.sharding import elements

pytestmark = pytest.mark.cpu("it is about names")

PACKAGE = Path(inspect.getfile(lora_inject)).parent
FALLBACKS = {
    "_is_functorch_active": torch_private._yes,
    "_count_dispatch_modes": torch_private._yes,
    "_is_tracing": torch_private._yes,
    "_is_legacy_batched": torch_private._yes,
}


def test_they_stand_in_one_file():
    private = re.compile(r"torch\._C|torch\.cpu\._|_current_level|aten\._|torch\.\w[\w.]*\._\w")
    found = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.ImportFrom) and private.search(ast.unparse(node))
    }
    assert found == {"torch_private.py"}


def test_private_names_of_torch_are_imported_nowhere_else():
    found = {
        f"{path.name}: {alias.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch"
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert found == set()


WITHOUT_NAMES = """
import torch

private, missing = __NAMES__, object()
for name in private:
    path, _, last = name.rpartition(".")
    owner = torch
    for part in path.split("."):
        owner = getattr(owner, part, missing)
    if hasattr(owner, last):
        private[name] = owner, last, getattr(owner, last)
        delattr(owner, last)
import lora_inject
from lora_inject import *
for owner, last, value in filter(None, private.values()):
    setattr(owner, last, value)  # torch itself needs them when it runs
assert sum(map(bool, private.values())) > 5

from torch import nn

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
x = torch.randn(3, 64)
before = model(x)
lora_inject.inject(model, r=2)
assert torch.equal(model(x), before)
model(x).sum().backward()
assert model[2].lora_B.grad.any()
lora_inject.merge(model)
lora_inject.strip(model)
assert torch.equal(model(x), before)
"""


def test_a_torch_whose_private_names_have_moved_is_imported_and_used():
    tree = ast.parse(inspect.getsource(torch_private))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [c.args[0].value for c in calls if getattr(c.func, "id", "") == "_named"
             and isinstance(c.args[0], ast.Constant)]  # fmt: skip
    # Operators and what torch.compile imports by name come back only with torch itself.
    names = [name for name in names if not name.startswith("ops.")]
    assert len(names) > 8
    code = WITHOUT_NAMES.replace("__NAMES__", repr(dict.fromkeys(names)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_gone_has_its_place_taken():
    assert torch_private._named("_C._no_such_name", torch_private._yes) is torch_private._yes
    assert torch_private._named("no.such.name", torch_private._no)() is False
    for otherwise in (True, False):
        assert torch_private.has_instructions("no_such", otherwise) is otherwise


def test_containers_are_known_without_torch():
    pair = namedtuple("pair", "one two")
    tree = {"a": [1, (2, {"b": pair(3, 4)})], "c": 5}
    expected = {"a": [10, (20, {"b": pair(30, 40)})], "c": 50}
    for tree_map in (torch_private.tree_map, torch_private._map_containers):
        assert tree_map(lambda leaf: 10 * leaf, tree) == expected
    assert torch_private.tree_leaves(tree) == [1, 2, 3, 4, 5]


def test_without_the_name_of_forward_mode_it_counts_as_on(monkeypatch):
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert torch_private.is_forward_mode()
    x, W, b, A, B = make(700)
    of = (x, A, B)
    for found, same in zip(
        gradients(layer("whole", 0.0)(x, W, b, A, B), of),
        gradients(plain(x, W, b, A, B), of),
        strict=True,
    ):
        torch.testing.assert_close(found, same)


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_a_name_values_and_gradients_are_right(name, dropout, monkeypatch):
    monkeypatch.setattr(torch_private, name, FALLBACKS[name])
    monkeypatch.setattr(ways, "_LARGE", 0)
    x, W, b, A, B = make(5)

    def run(again):
        torch.manual_seed(1)
        body = layer("whole", dropout)
        y = checkpoint(body, x, W, b, A, B, use_reentrant=False) if again else body(x, W, b, A, B)
        return [y, *gradients(y, (x, A, B))]

    for found, again in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(found, again)
    if not dropout:
        torch.testing.assert_close(run(False)[0], plain(x, W, b, A, B))


@pytest.mark.parametrize("gone", ["_hooks_of_saved_tensors", "unpack_hook", "data"])
def test_without_knowing_of_hooks_a_product_is_kept_itself(gone, monkeypatch):
    if gone == "_hooks_of_saved_tensors":
        monkeypatch.setattr(torch_private, gone, torch_private._yes)
    else:
        monkeypatch.delattr(torch._C._autograd.SavedTensor, gone, raising=False)
    monkeypatch.setattr(ways, "_LARGE", 0)
    (x, W, b, A, B), u = make(5), torch.randn(5, I, dtype=torch.float64, requires_grad=True)
    product = x.sin() * u.sin()
    assert torch_private.factors_kept(product) is None
    of = (x, u, A, B)
    found = gradients(layer("whole", 0.0)(product, W, b, A, B), of, retain=True)
    for one, same in zip(found, gradients(plain(product, W, b, A, B), of), strict=True):
        torch.testing.assert_close(one, same)


def test_a_node_without_access_to_what_it_keeps_keeps_it():
    x = torch.randn(3, requires_grad=True)
    for node in (None, x.sin().grad_fn, object()):
        torch_private.keep_instead(node, lambda: pytest.fail("it is kept"))


def test_without_the_free_view_an_output_is_a_view(monkeypatch):
    monkeypatch.setattr(ways, "unsafe_view", torch.Tensor.view)
    model = nn.Sequential(nn.Linear(I, I, bias=False))
    x = torch.randn(2, 3, I)
    before = model(x)
    inject(model, "0", r=R)
    assert torch.equal(model(x), before)


def test_without_the_place_of_a_shard_the_whole_tensor_is_asked(monkeypatch):
    import torch.distributed.tensor  # before its part is missing

    name = "torch.distributed.tensor._utils"
    original = builtins.__import__

    def missing(wanted, *args, **kwargs):
        if wanted == name:
            raise ImportError(wanted)
        return original(wanted, *args, **kwargs)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert torch_private.offset_of_shard((2,), None, None) is None
    monkeypatch.setattr("lora_inject.sharding.offset_of_shard", lambda *args: None)
    whole = torch.arange(12.0).view(3, 4)

    class Sharded:  # what elements asks of a DTensor
        placements = device_mesh = shape = None
        to_local = full_tensor = lambda self: whole

    assert elements(Sharded(), torch.tensor([1, 7])).tolist() == [1, 7]
