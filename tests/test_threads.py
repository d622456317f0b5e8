"""Threads: many run one model while nothing changes it; each injects into a model of its own."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    disabled,
    inject,
    lora_parameters,
    lora_state_dict,
    merge,
    plan,
    report,
    strip,
    unmerge,
    use,
)

pytestmark = pytest.mark.cpu("it is about threads, not values")

MANY = 8


@pytest.fixture(autouse=True)
def _switching():
    """Threads take turns after very few steps."""
    former, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(former)
    torch.set_num_threads(threads)


def together(action, inputs):
    """What an action makes of each input, each in a thread, which all begin at once."""
    barrier = Barrier(len(inputs))

    def begin(value):
        barrier.wait()
        return action(value)

    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(begin, inputs))


class Both(nn.Module):
    """Layers that are adapted beside their forward, and some in their weight."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.GRU(3, 3)

    def forward(self, tokens):
        x = self.net.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        for layer in self.net.layers:
            x = layer(x)
        return self.rnn(self.net.head(x))[0]


def adapted(how, variant):
    torch.manual_seed(0)
    model = Both().eval()
    inject(model, [nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.GRU] if variant == "lora"
           else ["q_proj", "v_proj"], r=2, how=how, variant=variant)  # fmt: skip
    randomize_adapters(model)
    return model


@pytest.mark.parametrize(
    ("how", "variant"), [("auto", "lora"), ("weight", "lora"), ("auto", "dora"), ("auto", "loha")]
)
@pytest.mark.parametrize("blocked", [False, True])
def test_many_threads_run_one_model(how, variant, blocked):
    model = adapted(how, variant)
    inputs = [ids() for _ in range(MANY)]
    block = disabled(model) if blocked else torch.enable_grad()
    with block:
        expected = [model(tokens) for tokens in inputs]
        before = snapshot(model)
        for _ in range(3):
            found = together(model, inputs)
            assert all(map(torch.equal, found, expected))
    if not blocked:
        assert changed_parts(before, snapshot(model)) == []


def test_threads_take_gradients_of_one_model_each_its_own():
    model = adapted("auto", "lora")
    inputs, parameters = [ids() for _ in range(MANY)], lora_parameters(model)

    def gradients(tokens):
        return torch.autograd.grad(model(tokens).square().mean(), parameters)

    expected = [gradients(tokens) for tokens in inputs]
    for found, wanted in zip(together(gradients, inputs), expected, strict=True):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_threads_look_at_one_model():
    model = adapted("auto", "lora")
    before = snapshot(model)
    expected = [str(report(model)), str(plan(model, "q_proj", adapter="b")), lora_state_dict(model)]

    def look(_):
        return [str(report(model)), str(plan(model, "q_proj", adapter="b")), lora_state_dict(model)]

    for found in together(look, range(MANY)):
        assert found[:2] == expected[:2]
        assert found[2].keys() == expected[2].keys()
    assert changed_parts(before, snapshot(model)) == []


def life(model):
    """Everything that one may do to a model of one's own; the outputs on the way."""
    tokens, outputs = torch.arange(10).reshape(2, 5), []
    inject(model, [nn.Linear, nn.MultiheadAttention, nn.GRU], r=2, adapter="a", seed=1)
    inject(model, "q_proj", r=1, adapter="b", variant="dora", seed=2)
    for parameter in lora_parameters(model):
        with torch.no_grad():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    for step in (lambda: use(model, "a"), lambda: merge(model), lambda: unmerge(model),
                 lambda: use(model, "b"), lambda: use(model)):  # fmt: skip
        step()
        outputs.append(model(tokens))
    strip(model)
    return [*outputs, model(tokens)]


def test_threads_inject_into_models_of_their_own():
    torch.manual_seed(0)
    first = Both().eval()
    models = [Both().eval() for _ in range(MANY)]
    for model in models:
        model.load_state_dict(first.state_dict())
    expected, before = life(first), [snapshot(model) for model in models]
    for found in together(life, models):
        assert all(map(torch.equal, found, expected))
    for former, model in zip(before, models, strict=True):
        assert changed_parts(former, snapshot(model)) == []
