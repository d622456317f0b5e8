"""The classes that are made for adapted layers: one for a base, and none longer than it."""

import gc
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from helpers import changed_parts, snapshot
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lora_inject import (
    LoRAInjectError,
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
