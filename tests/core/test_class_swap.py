"""The classes that are made for adapted layers: one for a base, and none longer than it."""

import abc
import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lora_inject import (
    LoRAInjectError,
    UnsupportedLayerError,
    disabled,
    inject,
    merge,
    plan,
    remove,
    strip,
    unmerge,
    use,
)

pytestmark = pytest.mark.usefixtures("device")


def test_made_classes_live_no_longer_than_the_class_they_were_made_of():
    def cell():
        class Tapped(nn.Linear):  # as a notebook's cell defines it, again at each run
            pass

        return nn.Sequential(Tapped(8, 8))

    def normed():  # a class for each module
        return nn.Sequential(weight_norm(nn.Linear(8, 8)))

    for make in (cell, normed):
        model = make()
        base, made = weakref.ref(type(model[0])), None
        inject(model, nn.Linear, r=2)
        made = weakref.ref(type(model[0]))
        strip(model)
        del model
        gc.collect()
        assert base() is None
        assert made() is None


def test_threads_get_one_class_for_one_base(request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # threads meet wherever they can
    for _ in range(20):

        class Fresh(nn.Linear):  # so that its adapted class has to be made
            pass

        models = [nn.Sequential(*(Fresh(4, 4) for _ in range(8))) for _ in range(4)]
        barrier = threading.Barrier(len(models))

        def adapt(model, barrier=barrier):
            barrier.wait()
            inject(model, nn.Linear, r=2)

        with ThreadPoolExecutor(len(models)) as pool:
            list(pool.map(adapt, models))
        assert len({type(layer) for model in models for layer in model}) == 1
        for model in models:
            strip(model)
            assert all(type(layer) is Fresh for layer in model)


def test_an_adapter_that_was_pruned_since_is_refused_by_path():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, "0", r=2)
    prune.random_unstructured(model[0], "lora_A", 0.5)
    state = snapshot(model)
    for call in (strip, use, lambda m: remove(m, "default")):
        with pytest.raises(LoRAInjectError, match="0: its lora_A is no parameter"):
            call(model)
        assert changed_parts(state, snapshot(model)) == []
    prune.remove(model[0], "lora_A")
    strip(model)


def test_a_merged_weight_that_was_pruned_since_is_refused_by_path():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2)
    merge(model)
    prune.random_unstructured(model[0], "weight", 0.5)
    for call in (strip, unmerge, lambda m: disabled(m).__enter__()):
        with pytest.raises(LoRAInjectError, match="0: its merged weight is no parameter"):
            call(model)


@pytest.mark.filterwarnings("error:.*more parameters")
def test_warnings_name_the_line_of_the_caller():
    model = nn.Sequential(nn.Linear(2, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(model, "0", r=4)
        strip(model)
        plan(model, "0", r=4).apply()
        strip(model)
        strip(model)
    assert [Path(w.filename) for w in caught] == [Path(__file__)] * 3


class Abstract(abc.ABC):  # noqa: B024
    """Of these a class has its layout, where they stand first."""


class Slotted:
    __slots__ = ()


class Registering:
    """Asks for an argument, and lists its subclasses."""

    known: ClassVar[list] = []

    def __init_subclass__(cls, *, label, **others):
        super().__init_subclass__(**others)
        Registering.known.append((cls, label))


class OfAbstract(Abstract, nn.Linear):
    pass


class OfGeneric(Generic[TypeVar("T")], nn.Linear):
    pass


class OfSlotted(Slotted, nn.Linear):
    pass


class WithSlots(nn.Linear):
    __slots__ = ("more",)


class Registered(nn.Linear, Registering, label="one"):
    pass


class RegisteredFirst(Registering, nn.Linear, label="two"):
    pass


class ConvOfAbstract(Abstract, nn.Conv1d):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, 1)

    def forward(self, x):
        return super().forward(x.unsqueeze(-1)).squeeze(-1)


class EmbeddingOfAbstract(Abstract, nn.Embedding):
    """Its adapter stands below its forward."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class ScaledOfAbstract(Abstract, nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledAndRegistered(nn.Linear, Registering, label="three"):
    def forward(self, x):
        return 3 * super().forward(x)


class AttentionOfAbstract(Abstract, nn.MultiheadAttention):
    def __init__(self, n, heads):
        super().__init__(n, 2)


ODD = [
    OfAbstract, OfGeneric, OfSlotted, WithSlots, Registered, RegisteredFirst, ConvOfAbstract,
    EmbeddingOfAbstract, ScaledOfAbstract, ScaledAndRegistered, AttentionOfAbstract,
]  # fmt: skip


@pytest.mark.parametrize("how", ["auto", "weight"])
@pytest.mark.parametrize("cls", ODD)
def test_classes_of_any_layout_are_adapted_and_come_back(cls, how):
    model = nn.Sequential(cls(4, 4))
    known = len(Registering.known)
    x = torch.tensor([0, 3]) if issubclass(cls, nn.Embedding) else torch.randn(3, 4)

    def call(model):
        return model[0](x, x, x)[0] if cls is AttentionOfAbstract else model(x)

    before, base = snapshot(model), call(model)
    inject(model, "0", r=2, how=how)
    assert torch.equal(call(model), base)
    assert isinstance(model[0], cls)
    randomize_adapters(model)
    adapted = call(model)
    assert not torch.equal(adapted, base)
    if cls is not AttentionOfAbstract:
        other = strip(copy.deepcopy(model))
        with torch.no_grad():
            BA = (model[0].lora_B.flatten(1) @ model[0].lora_A.flatten(1)).detach()
            W = other[0].weight
            W += BA.T if issubclass(cls, nn.Embedding) else BA.view(W.shape)
        torch.testing.assert_close(call(other), adapted)
    assert torch.equal(call(copy.deepcopy(model)), adapted)
    assert torch.equal(call(pickle.loads(pickle.dumps(model))), adapted)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    assert len(Registering.known) == known


def test_a_class_of_which_none_can_be_derived_is_refused_before():
    class Sealing(type):
        def __new__(mcs, name, bases, body, **options):
            if any(isinstance(base, mcs) for base in bases):
                raise TypeError("it is sealed")
            return super().__new__(mcs, name, bases, body, **options)

    class Sealed(nn.Linear, metaclass=Sealing):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Sealed(4, 4))
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=r"^1: .*Sealed \(it is sealed\)"):
        plan(model, nn.Linear, r=2)
    assert [skip.path for skip in plan(model, r=2).skipped] == ["1"]
    assert changed_parts(before, snapshot(model)) == []
