"""A weight that is read from outside of its layer's own forward is noticed when that happens."""

import copy
import threading
import types
import warnings

import pytest
import torch
import transformers as tf
from families import FAMILIES
from helpers import quantize, randomize_adapters
from torch import nn
from torch.nn import functional as F

from lora_inject import disabled, inject, merge, strip
from lora_inject.errors import LoRAInjectWarning

OUTSIDE = "is read outside of its forward, by "


@pytest.fixture
def heard():
    """What was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if OUTSIDE in str(w.message)]


def language_model():
    torch.manual_seed(0)
    family = FAMILIES["llama"]
    return family.build().train(), family.inputs()


def chunked_forward(self, input_ids, labels=None):
    """What trainers put in place of a model's forward: logits of a few tokens at a time."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    weight, bias = self.lm_head.weight, self.lm_head.bias
    return torch.cat([F.linear(part, weight, bias) for part in hidden.split(3, 1)], 1)


def test_a_fused_head_is_told_once_with_path_place_and_remedy(heard):
    model, inputs = language_model()
    inject(model, ["q_proj", "lm_head"], r=2)
    model.forward = types.MethodType(chunked_forward, model)
    for _ in range(3):
        model(**inputs).sum().backward()
    (text,) = heard()
    assert text.startswith(f"lm_head: its weight {OUTSIDE}chunked_forward of test_outside, line ")
    assert 'how="weight"' in text


def test_in_the_weight_the_fused_head_is_right(heard):
    model, inputs = language_model()
    inject(model, "lm_head", r=2, how="weight")
    randomize_adapters(model)
    expected = model(**inputs).logits
    model.forward = types.MethodType(chunked_forward, model)
    torch.testing.assert_close(model(**inputs), expected)
    assert heard() == []


def fused_loss(hidden, *, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten())


def test_a_loss_that_gets_the_weight_is_told(heard):
    model, inputs = language_model()
    inject(model, "lm_head", r=2)
    hidden = model.model(**inputs).last_hidden_state
    fused_loss(hidden, weight=model.lm_head.weight, labels=inputs["input_ids"])
    assert len(heard()) == 1
    with torch.no_grad():
        fused_loss(hidden, weight=model.lm_head.weight, labels=inputs["input_ids"])
    model.eval()
    fused_loss(hidden, weight=model.lm_head.weight, labels=inputs["input_ids"])
    assert len(heard()) == 1


class OverModules(nn.Module):
    """Goes through its modules."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Conv1d(4, 4, 1)})

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = F.linear(x, module.weight)
        return x


class Held:
    """No module, and not seen from one."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return F.linear(x, self.layer.weight)


class OverHeld(nn.Module):
    """Has something that holds its layer."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.held = [Held(self.proj)]

    def forward(self, x):
        return self.held[0](x)


@pytest.mark.parametrize("make", [OverModules, OverHeld])
def test_readers_that_no_code_shows_are_told(make, heard):
    model = make().eval()
    inject(model, nn.Linear, r=2)
    with torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 4))
    assert len(heard()) == 1
    strip(model)
    model(torch.ones(1, 4))
    inject(model, nn.Linear, r=2)
    model(torch.ones(1, 4))
    assert len(heard()) == 2  # once for each call of inject


class Asking(nn.Module):
    """Asks for facts about a weight, as T5 and CLIP do."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        ask = self.modules().__next__
        for module in (ask(), ask()):
            if isinstance(module, nn.Linear) and isinstance(module.weight, torch.Tensor):
                x = x.to(module.weight.dtype).to(module.weight.device)
                if module.weight is not None:
                    x = module(x)
        return x


def test_facts_are_no_reads(heard):
    model = Asking()
    inject(model, nn.Linear, r=2)
    model(torch.ones(1, 4)).sum().backward()
    assert heard() == []


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_forwards_of_families_are_quiet(name, heard):
    family = FAMILIES[name]
    model = family.build()
    inject(model, lambda path, m: isinstance(m, (nn.Linear, nn.Embedding, nn.Conv2d)), r=2)
    model(**family.inputs())[0].sum().backward()
    assert heard() == []


def test_a_quantized_layer_is_quiet(heard):
    model = nn.Sequential(nn.Linear(32, 32))
    quantize(model, "int8")
    inject(model, nn.Linear, r=2)
    model(torch.ones(1, 32)).sum().backward()
    assert heard() == []


def reference(weight):
    """What a test computes by hand."""
    return weight @ weight.mT


def test_looking_at_a_weight_is_no_use(heard):
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    inject(model, nn.Linear, r=2)
    W = layer.weight
    former = layer.weight.clone()
    assert layer.weight is layer.get_parameter("weight") is layer._parameters["weight"] is W
    assert torch.equal(layer.weight, former)
    assert layer.weight.detach().norm() == former.norm()
    seen = [F.linear(torch.ones(1, 4), layer.weight), torch.ones(1, 4) @ layer.weight.T]
    seen.append(layer.weight)
    assert isinstance(layer.weight, nn.Parameter)
    assert id(layer.weight) == id(W)
    assert copy.deepcopy(model)[0].weight is not W
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias", "lora_A", "lora_B"]
    nn.init.zeros_(layer.weight)
    assert not W.any()
    layer.weight = nn.Parameter(former)
    assert layer._parameters["weight"] is layer.weight is not W
    reference(layer.weight.detach())
    assert heard() == []


def test_what_does_not_run_is_read_as_it_is(heard):
    model = OverHeld()
    inject(model, nn.Linear, r=2)
    with disabled(model):
        model(torch.ones(1, 4))
    merge(model)
    model(torch.ones(1, 4))
    assert heard() == []


def test_layers_run_in_threads_without_a_word(heard):
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    inject(model, lambda path, m: path in ("0", "1"), r=2)
    threads = [threading.Thread(target=model, args=(torch.ones(4, 4),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard() == []


def test_a_compiled_read_is_the_weight(heard):
    model = OverHeld()
    inject(model, nn.Linear, r=2)
    torch.compiler.reset()
    compiled = torch.compile(model.proj, backend="eager", fullgraph=True)
    x = torch.ones(1, 4)
    torch.testing.assert_close(compiled(x), model.proj(x))
    assert heard() == []


def test_a_tied_head_that_is_read_is_told(heard):
    """GPT-2's embedding, which a loss of one's own takes for the head."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
                           eos_token_id=2)  # fmt: skip
    model = tf.GPT2Model(config)
    inject(model, "wte", r=2)
    ids = torch.ones(1, 3, dtype=torch.long)
    hidden = model(input_ids=ids)[0]
    fused_loss(hidden, weight=model.get_input_embeddings().weight, labels=ids)
    (text,) = heard()
    assert text.startswith("wte: ")


def test_the_warning_is_of_this_library():
    model = OverHeld()
    inject(model, nn.Linear, r=2)
    with pytest.warns(LoRAInjectWarning, match="its adapter acts beside that forward"):
        model(torch.ones(1, 4))
