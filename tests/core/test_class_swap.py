"""The classes that are made for adapted layers: one for a base, and none longer than it."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lora_inject import inject, strip

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
