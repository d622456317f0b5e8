"""A fresh adapter of any method beside one that has trained changes no bit of what there is."""

import pytest
import torch
from every_kind import make
from test_every_method import METHODS, REFUSED, moved

from lora_inject import LoRAInjectError, inject

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
@pytest.mark.parametrize("first", ["lora", "start pissa", "variant dora", "dora of pissa"])
def test_a_fresh_one_changes_no_bit_beside_a_trained_one(first, kind, dtype):
    methods, done = {"lora": {}, **METHODS}, 0
    for second, method in methods.items():
        if (second, kind) in REFUSED:
            continue
        torch.manual_seed(0)
        layer, call, arguments = make(kind, dtype)
        inject(layer, **{**arguments, **methods[first]}, adapter="trained")
        moved(layer)
        with torch.no_grad():
            expected = call(layer)
            try:
                inject(layer, **{**arguments, **method}, adapter="fresh")
            except LoRAInjectError:  # what acts in the weight, beside what does not
                continue
            assert torch.equal(call(layer), expected), second
            done += 1
    assert done > 5
