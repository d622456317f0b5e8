"""What an audit puts back: whatever modules keep, of whatever class and layout."""

from collections import Counter, OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from lora_inject import audit, inject

pytestmark = pytest.mark.cpu("layouts and types that not every device has")


class Remembers(nn.Module):
    """A model that writes to all that it keeps, in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.counted, self.ordered = Counter(calls=2), OrderedDict(a=1, b=2)
        self.recent, self.lists = deque([1, 2], maxlen=2), defaultdict(list, x=[1])
        self.output = BaseModelOutput(last_hidden_state=torch.zeros(1))
        self.plain, self.deep = torch.zeros(3), {"cache": [{"keys": torch.zeros(2)}]}

    def kept(self):
        named = self.counted, self.ordered, self.recent, self.lists, [*self.output]
        return repr([*named, self.plain, self.deep])

    def forward(self, x):
        self.counted["calls"] += 1
        self.ordered.move_to_end("a")
        self.recent.append(3)
        self.lists["x"].append(2)
        self.lists["y"].append(2)
        self.output["hidden_states"] = x
        self.plain += 1
        self.deep["cache"][0]["keys"].add_(1)
        self.deep["cache"].append({})
        return self.fc(x)


def test_containers_of_any_class_and_depth_hold_what_they_held():
    model = Remembers()
    inject(model, "fc", r=2)
    before = model.kept()
    model(torch.randn(2, 4))
    assert model.kept() != before
    before = model.kept()
    assert audit(model, torch.randn(2, 4)).clean
    assert model.kept() == before


BUFFERS = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2)] * 2, layout=torch.jagged),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex with NaN": lambda: torch.full((2,), float("nan"), dtype=torch.complex64),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "complex of 16 bits": lambda: torch.ones(2, dtype=torch.complex32),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "unsigned": lambda: torch.zeros(2, dtype=torch.uint16),
    "NaN": lambda: torch.tensor(float("nan")),
    "meta": lambda: torch.zeros(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore")  # of layouts that are said to be in beta
@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_a_buffer_of_any_layout_and_type_that_stands_still_is_no_fault(make):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("kept", make())
    inject(model, "0", r=2)
    assert audit(model, torch.randn(2, 4)).clean


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["coo", "csr", "strided"])
def test_a_buffer_that_is_written_to_is_found_and_put_back(layout):
    model, value = nn.Sequential(nn.Linear(4, 4)), torch.eye(4)
    model.register_buffer("kept", BUFFERS[layout]() if layout != "strided" else value.clone())
    inject(model, "0", r=2)

    def writes(*_):
        model.kept.mul_(2)

    model[0].register_forward_hook(writes)
    assert audit(model, torch.randn(2, 4)).codes == ("statistics-move",)
    assert torch.equal(model.kept.to_dense(), value)
