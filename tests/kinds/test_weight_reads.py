"""Weights that something reads without calling their layer, however its code comes to them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from helpers import randomize_adapters
from torch import nn
from torch.nn import functional as F

from lora_inject import inject, merge, merged, plan
from lora_inject.errors import UnsupportedLayerError
from lora_inject.kinds import bytecode, weight_reads

pytestmark = pytest.mark.usefixtures("device")
N = 4


def product(x, layer):
    return x @ layer.weight.T


def called(x, layer):
    return layer(x)


class Block(nn.Module):
    """Three layers to be read, and others that are only called."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.fc = (nn.Linear(N, N) for _ in range(3))
        self.ps = nn.ModuleList(nn.Linear(N, N) for _ in range(2))
        self.d = nn.ModuleDict({"a": nn.Linear(N, N)})
        self.inner = nn.ModuleDict({"p": nn.Linear(N, N)})


class Plainly(Block):
    def forward(self, x):
        return F.linear(self.fc(x), self.p.weight)


class ByLocal(Block):
    def forward(self, x):
        p = self.p
        return F.linear(self.fc(x), p.weight, p.bias)


class ByPair(Block):
    def forward(self, x):
        p, q = self.p, self.q
        return F.linear(F.linear(self.fc(x), p.weight), q.weight)


class ByIndex(Block):
    def forward(self, x):
        return F.linear(self.fc(x), self.ps[0].weight)


class ByLoop(Block):
    def forward(self, x):
        for _number, p in enumerate(self.ps):
            x = F.linear(x, p.weight)
        return self.fc(x)


class ByComprehension(Block):
    def forward(self, x):
        return self.fc(x) + sum([F.linear(x, p.weight) for p in self.ps])


class ByItem(Block):
    def forward(self, x):
        return F.linear(self.fc(x), self.d["a"].weight)


class ByItems(Block):
    def forward(self, x):
        for _name, p in self.d.items():
            x = F.linear(x, p.weight)
        return self.fc(x)


class ByHelper(Block):
    def forward(self, x):
        return product(self.fc(x), self.p)


class ByMethod(Block):
    def product(self, layer, x):
        return F.linear(x, layer.weight)

    def forward(self, x):
        return self.product(self.p, self.fc(x))


class ByStaticMethod(Block):
    @staticmethod
    def product(x, layer):
        return F.linear(x, layer.weight)

    def forward(self, x):
        return self.product(self.fc(x), self.p)


class ByProperty(Block):
    @property
    def weight(self):
        return self.p.weight

    def forward(self, x):
        return F.linear(self.fc(x), self.weight)


class ByDecorated(Block):
    @torch.no_grad()
    def product(self, x):
        return F.linear(x, self.p.weight)

    def forward(self, x):
        return self.product(self.fc(x))


class Mixin:
    def product(self, x):
        return F.linear(x, self.p.weight)


class ByMixin(nn.Module, Mixin):
    def __init__(self):
        _fill(self)

    def forward(self, x):
        return self.product(self.fc(x))


def _fill(module):
    nn.Module.__init__(module)
    for name, child in Block().named_children():
        setattr(module, name, child)


class ByAnotherName(Block):
    def forward(this, x):  # noqa: N805
        return F.linear(this.fc(x), this.p.weight)


class ByLambda(Block):
    def forward(self, x):
        run = lambda h: F.linear(h, self.p.weight)  # noqa: E731
        return run(self.fc(x))


class Deep(Block):
    def forward(self, x):
        return F.linear(self.fc(x), self.inner.p.weight)


class InSetup(Block):
    """What is called setup, and is part of the forward all the same."""

    def load_product(self, x):
        return F.linear(x, self.p.weight)

    def forward(self, x):
        return self.load_product(self.fc(x))


READ = {
    Plainly: ["p"], ByLocal: ["p"], ByPair: ["p", "q"], ByIndex: ["ps.0", "ps.1"],
    ByLoop: ["ps.0", "ps.1"], ByComprehension: ["ps.0", "ps.1"], ByItem: ["d.a"],
    ByItems: ["d.a"], ByHelper: ["p"], ByMethod: ["p"], ByStaticMethod: ["p"], ByProperty: ["p"],
    ByDecorated: ["p"], ByMixin: ["p"], ByAnotherName: ["p"], ByLambda: ["p"], Deep: ["inner.p"],
    InSetup: ["p"],
}  # fmt: skip


@pytest.mark.parametrize("cls", READ)
def test_what_is_read_is_adapted_in_its_weight_and_nothing_else(cls):
    model = nn.Sequential(cls())
    ways = {site.path.removeprefix("0."): site.way for site in plan(model, r=2).sites}
    assert [path for path, way in ways.items() if way == "weight"] == READ[cls]
    inject(model, r=2)
    randomize_adapters(model)
    x = torch.randn(3, N)
    if cls is not ByDecorated:
        model(x).sum().backward()
        read = [model.get_submodule(f"0.{path}") for path in READ[cls]]
        assert any(layer.lora_A.grad is not None for layer in read)


class Called(Block):
    """Calls everything, in every form, and asks for facts alone."""

    def forward(self, x):
        for p in self.ps:
            x = p(x).to(p.weight.dtype)
        for p in self.d.values():
            x = p(x)
        p, number = self.p, self.q.weight.shape[0]
        x = called(p(x), self.inner["p"]) * number
        return self.fc(x) if isinstance(self.fc.weight, nn.Parameter) else x

    def _init_weights(self, module):
        nn.init.normal_(module.weight)
        self.p.weight.data.zero_()

    def reset_parameters(self):
        for p in self.ps:
            p.weight.data.zero_()

    def fuse_projections(self):
        self.p.weight.data = torch.cat([self.p.weight, self.q.weight])[:N]


def test_facts_and_setup_are_no_part_of_the_forward():
    sites = plan(nn.Sequential(Called()), r=2).sites
    assert [(site.path, site.way) for site in sites if site.way != "branch"] == []


def test_the_attention_of_a_unet_stands_beside_its_forward():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model = nn.Sequential(attention(8, heads=2, dim_head=4))
    assert {s.way for s in plan(model, ["to_q", "to_k", "to_v"], r=2).sites} == {"branch"}
    inject(model, ["to_q", "to_k", "to_v"], r=2, dropout=0.1)


def rwkv(every):
    torch.manual_seed(0)
    config = tf.RwkvConfig(
        vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=3,
        rescale_every=every,
    )  # fmt: skip
    model = tf.RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.rwkv.blocks:  # which begin at zero
            block.attention.output.weight.normal_(std=0.3)
            block.feed_forward.value.weight.normal_(std=0.3)
    return model


RESCALED = ["rwkv.blocks.*.attention.output", "rwkv.blocks.*.feed_forward.value"]
IDS = torch.tensor([[3, 4, 5]])


def test_weights_that_a_model_rescales_as_it_runs_are_left_alone_and_refused_when_named():
    """RWKV divides them by two every few blocks, in evaluation and in place."""
    model = rwkv(every=1)
    for pattern in RESCALED:
        with pytest.raises(UnsupportedLayerError, match="RwkvModel writes to its weight") as raised:
            plan(model, pattern)
        assert "rescale_every = 0" in str(raised.value)
    inject(model, "all-linear", r=2)
    randomize_adapters(model)
    for training in (False, True, False):
        model.train(training)
        expected = model(IDS, use_cache=False).logits
        with merged(model):
            torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)


def test_a_model_that_does_not_rescale_has_all_its_layers_adapted():
    model = rwkv(every=1)
    model.config.rescale_every = 0
    assert len(inject(model, RESCALED, r=2).patterns) == 2
    randomize_adapters(model)
    expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(model.train()(IDS, use_cache=False).logits, expected)
    merge(model)
    torch.testing.assert_close(model.eval()(IDS, use_cache=False).logits, expected)


class Initialised(nn.Module):
    """Writes to a weight when it is made, and never when it runs."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self._init_weights()

    def _init_weights(self):
        self.proj.weight.normal_(std=0.02) if torch.is_inference_mode_enabled() else None

    def forward(self, x):
        return self.proj(x)


def test_what_initialises_a_weight_is_no_writer():
    assert [site.path for site in plan(Initialised(), "proj").sites] == ["proj"]


def from_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_class_may_change_and_be_asked_about_while_its_code_is_read(monkeypatch):
    class Reads(Plainly):
        def forward(self, x):
            return F.linear(self.fc(x), self.p.weight)

    looks, answers = weight_reads.function_of, []

    def look(member):
        if not answers:
            answers.append(None)
            Reads.other = None  # as inject does to a class, in a thread of its own
            answers[:] = [from_another_thread(lambda: weight_reads.weights_read_below(Reads))]
        return looks(member)

    monkeypatch.setattr(weight_reads, "function_of", look)
    assert [weight_reads.weights_read_below(Reads), *answers] == [{("p",)}] * 2


def reads_the_weight(layer, x):
    return x @ layer.weight.T


def test_a_helper_may_be_asked_about_while_its_code_is_read(monkeypatch):
    reads, answers = bytecode._read, []

    def read(*arguments):
        if not answers:
            answers.append(None)
            helper = bytecode._reads_its_arguments
            answers[:] = [from_another_thread(lambda: helper(reads_the_weight))]
        return reads(*arguments)

    monkeypatch.setattr(bytecode, "_read", read)
    assert [bytecode._reads_its_arguments(reads_the_weight), *answers] == [True, True]
