"""Layers that are adapted in their weight: what they compute equals W + s B A written out.

The reference is always a plain copy of the layer whose weights have been replaced.
"""

import copy
import threading

import pytest
import torch
from helpers import changed_parts, paired, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lora_inject import (
    AlreadyAdaptedError,
    LoRALayer,
    UnsupportedLayerError,
    inject,
    plan,
    strip,
)

pytestmark = pytest.mark.usefixtures("device")


def written_out(model):
    """A stripped copy and its parameters with W + s B A, as functions of our A and B."""
    plain = strip(copy.deepcopy(model))
    weights = dict(plain.named_parameters())
    for path, layer in model.named_modules():
        if not isinstance(layer, LoRALayer):
            continue
        for adapter in layer.lora_adapters:
            for spec, (A_name, B_name) in paired(adapter):
                A, B = layer.get_parameter(A_name), layer.get_parameter(B_name)
                BA = B @ A
                name = f"{path}.{spec.weight}".lstrip(".")
                W = weights[name].detach()
                if BA.shape != W.shape:
                    BA = BA.transpose(-2, -1)
                weights[name] = W + adapter.settings.scaling * BA
    return plain, weights


def check_against_reference(model, call, rtol=1e-10, atol=1e-12):
    """Values and gradients of every A and B equal those of the reference."""
    plain, weights = written_out(model)
    ours = call(model)
    theirs = call(lambda *args, **kwargs: functional_call(plain, weights, args, kwargs))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    direction = torch.randn_like(ours)
    got = torch.autograd.grad((ours * direction).sum(), parameters)
    want = torch.autograd.grad((theirs * direction).sum(), parameters)
    for one, other in zip(got, want, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def attention(**options):
    return nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "attention", "padding"])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}])
def test_multihead_attention(batch_first, need_weights, mask, sizes):
    layer = attention(batch_first=batch_first, **sizes)
    inject(layer, [nn.MultiheadAttention, "out_proj"], r=2, alpha=3)
    randomize_adapters(layer, 0.5)
    names = [n for n, _ in layer.named_parameters() if "lora_A" in n]
    expected = ["in_proj_weight_lora_A"] if "kdim" not in sizes else [
        f"{x}_proj_weight_lora_A" for x in "qkv"
    ]  # fmt: skip
    assert names == [*expected, "out_proj.lora_A"]
    query = torch.randn(3, 3, 8, dtype=torch.float64)
    key = torch.randn(3, 3, sizes.get("kdim", 8), dtype=torch.float64)
    value = torch.randn(3, 3, sizes.get("vdim", 8), dtype=torch.float64)
    options = {"need_weights": need_weights}
    if mask == "attention":
        options["attn_mask"] = torch.ones(3, 3, dtype=torch.bool).triu(1)
    if mask == "padding":
        padded = torch.zeros(3, 3, dtype=torch.bool)
        padded[1, 2] = True
        options["key_padding_mask"] = padded
    base = {k: v.clone() for k, v in layer.state_dict().items()}
    check_against_reference(layer, lambda m: m(query, key, value, **options)[0])
    assert all(torch.equal(v, base[k]) for k, v in layer.state_dict().items())


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, dropout=0.0, dtype=torch.float64, **options
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoder_computes_the_same_in_every_mode(norm_first, padded, nested):
    model = nn.TransformerEncoder(
        encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=nested
    )
    before = snapshot(model)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    base = model.eval()(x, src_key_padding_mask=mask)
    model.train()
    shown = plan(model, "all-linear", r=2)
    assert len(shown.sites) == 2 * 4
    assert {site.way for site in shown.sites} == {"weight"}
    inject(model, "all-linear", r=2)
    randomize_adapters(model, 0.5)

    def call(m):
        return m(x, src_key_padding_mask=mask)[~mask]

    outputs = [call(model.train())]
    outputs += [call(model.eval())]
    with torch.no_grad():
        outputs += [call(model), call(model.train())]
        outputs += [call(model.eval())]
    assert (outputs[0] - base[~mask]).abs().max() > 1e-3
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=1e-10)
    check_against_reference(model.train(), call)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.cpu("torch leaves it where a default device is set")
def test_the_fast_path_is_kept_and_reads_effective_weights(monkeypatch):
    calls = []
    fast = torch._transformer_encoder_layer_fwd

    def counting(*arguments):
        calls.append(arguments)
        return fast(*arguments)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inject(layer, "all-linear", r=2)
    randomize_adapters(layer, 0.5)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        output = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_whole_transformer_trains_and_comes_back():
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    before = snapshot(model)
    inject(model, "all-linear", r=2)
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    adapted = [m for m in model.modules() if isinstance(m, LoRALayer)]
    assert len(adapted) == 2 * 4 + 2 * 6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(source, target).pow(2).sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.any(), name
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


RECURRENT = {
    "LSTM": lambda: nn.LSTM(4, 6, dtype=torch.float64),
    "LSTM of many": lambda: nn.LSTM(
        4, 6, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64
    ),
    "LSTM with projection": lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3, dtype=torch.float64),
    "LSTM without bias": lambda: nn.LSTM(4, 6, bias=False, dtype=torch.float64),
    "GRU": lambda: nn.GRU(4, 6, num_layers=2, bidirectional=True, dtype=torch.float64),
    "RNN": lambda: nn.RNN(4, 6, nonlinearity="relu", dtype=torch.float64),
    "LSTMCell": lambda: nn.LSTMCell(4, 6, dtype=torch.float64),
    "GRUCell": lambda: nn.GRUCell(4, 6, dtype=torch.float64),
    "RNNCell": lambda: nn.RNNCell(4, 6, dtype=torch.float64),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    layer = RECURRENT[name]()
    x = torch.randn(3, 5, 4, dtype=torch.float64) if "Cell" not in name else torch.randn(3, 4)
    x = x.double()

    state = torch.randn(3, 6).double()
    state = (state, state) if name == "LSTMCell" else state

    def call(m):
        output = m(x, state) if "Cell" in name else m(x)
        return output[0] if isinstance(output, tuple) else output

    before, expected = snapshot(layer), call(layer)
    inject(layer, type(layer), r=2, alpha=3)
    assert torch.equal(call(layer), expected)
    matrices = sum(name.startswith("weight_") for name in layer.state_dict() if "lora" not in name)
    assert sum("lora_A" in name for name in layer.state_dict()) == matrices
    randomize_adapters(layer, 0.5)
    if "Cell" in name:
        check_against_reference(layer, call)
    else:  # functional_call does not reach the flat list of weights: replace them in a copy
        plain, weights = written_out(layer)
        with torch.no_grad():
            for key, parameter in plain.named_parameters():
                parameter.copy_(weights[key])
        torch.testing.assert_close(call(layer), call(plain), rtol=1e-10, atol=1e-12)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    optimizer.zero_grad()
    call(layer).pow(2).sum().backward()
    assert all(p.grad.any() for n, p in layer.named_parameters() if "lora_" in n)
    optimizer.step()
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []
    assert torch.equal(call(layer), expected)


def test_gradients_of_a_recurrent_layer_by_differences():
    layer = nn.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    inject(layer, nn.LSTM, r=1)
    randomize_adapters(layer, 0.5)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: layer(x)[0], parameters)


def test_packed_sequences_and_states():
    layer = nn.LSTM(4, 6, batch_first=True)
    inject(layer, nn.LSTM, r=2)
    randomize_adapters(layer, 0.5)
    x = torch.randn(2, 5, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
    output, _ = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)
    torch.testing.assert_close(output[0], layer(x[:1])[0][0])
    torch.testing.assert_close(output[1, :3], layer(x[1:, :3])[0][0])


@pytest.mark.parametrize("after", ["copy", "half and back", "flatten", "pickle"])
def test_a_recurrent_layer_survives(after):
    import pickle

    layer = nn.LSTM(4, 6)
    inject(layer, nn.LSTM, r=2)
    randomize_adapters(layer, 0.5)
    x = torch.randn(3, 2, 4)
    expected = layer(x)[0]
    if after == "copy":
        layer = copy.deepcopy(layer)
    elif after == "half and back":
        layer.half().float()
    elif after == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    layer.flatten_parameters()
    close = {"rtol": 1e-2, "atol": 1e-2} if "half" in after else {}
    torch.testing.assert_close(layer(x)[0], expected, **close)
    train_steps(layer, x)
    strip(layer)
    assert all(w is p for w, p in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert not torch.equal(layer(x)[0], expected)


def test_a_tagger_with_an_lstm():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.rnn = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
            self.tag = nn.Linear(12, 4)

        def forward(self, ids):
            return self.tag(self.rnn(self.embed(ids))[0])

    model, x = Tagger(), torch.randint(11, (3, 5))
    before, base = snapshot(model), copy.deepcopy(model).requires_grad_(False)
    inject(model, ["all-linear", "rnn", "embed"], r=2)
    # Frozen, since torch multiplies strided inputs in another way when the weight is frozen.
    assert torch.equal(model(x), base(x))
    first = train_steps(model, x, steps=1)
    assert train_steps(model, x, steps=10) < first
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


class Reads(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        if isinstance(self.proj, nn.Conv1d):
            return F.conv1d(x, self.proj.weight)
        if isinstance(self.proj, nn.Embedding):
            return F.embedding(x, self.proj.weight)
        weight = self.proj.weight
        return F.linear(x, weight if isinstance(self.proj, nn.Linear) else weight.t())


def read_cases():
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 4, dtype=torch.float64)
    return {
        "linear": (nn.Linear(4, 6).double(), x),
        "Conv1D": (Conv1D(6, 4).double(), x),
        "embedding": (nn.Embedding(5, 3).double(), torch.tensor([1, 4])),
        "conv": (nn.Conv1d(4, 6, 3).double(), torch.randn(2, 4, 8).double()),
    }


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "conv"])
def test_how_weight_reaches_weights_that_are_read(name):
    layer, x = read_cases()[name]
    model = Reads(layer)
    before, expected = snapshot(model), model(x)
    inject(model, "proj", r=2, how="weight")
    assert torch.equal(model(x), expected)
    randomize_adapters(model, 0.5)
    if name != "conv":
        check_against_reference(model, lambda m: m(x))
    assert not torch.equal(model(x), expected)
    model(x).sum().backward()
    assert layer.lora_A.grad.any()
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_how_can_be_said_per_pattern():
    model = nn.ModuleDict({"read": nn.Linear(4, 4), "called": nn.Linear(4, 4)})
    shown = plan(model, {"read": {"how": "weight"}, "called": {}}, r=2)
    assert {site.path: site.way for site in shown.sites} == {"read": "weight", "called": "branch"}


def test_a_weight_adapter_has_no_input_for_dropout():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    with pytest.raises(UnsupportedLayerError, match=r"dropout=0\.1"):
        inject(model, "attn", dropout=0.1)
    shown = inject(model, "all-linear", r=2, dropout=0.1)
    assert any("Not adapted: attn and 1 more" in note for note in shown.notes)
    strip(model)
    inject(model, {"attn": {"dropout": 0.0}, "up": {}}, r=2, dropout=0.1)


def test_rounding_happens_once():
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    inject(layer, nn.Linear, r=4, how="weight")
    randomize_adapters(layer, 0.05)
    exact = layer._parameters["weight"].float() + layer.lora_B @ layer.lora_A
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(8, 2, batch_first=True)])
def test_compile_in_one_graph(make):
    layer, x = make(), torch.randn(2, 3, 8)
    inject(layer, "all-linear", r=2)
    randomize_adapters(layer, 0.5)
    compiled = torch.compile(lambda x: layer(x, x, x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, x, x)[0])


def test_state_dict_keeps_the_base_keys():
    layer = nn.MultiheadAttention(8, 2)
    keys = list(layer.state_dict())
    base = layer.in_proj_weight.detach().clone()
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    state = layer.state_dict()
    assert [k for k in state if "lora_" not in k] == keys
    assert torch.equal(state["in_proj_weight"], base)


def test_an_adapted_weight_is_not_adapted_again():
    layer = nn.LSTM(4, 4)
    inject(layer, nn.LSTM, r=2)
    with pytest.raises(AlreadyAdaptedError):
        inject(layer, nn.LSTM, r=2)


def test_a_weight_is_computed_once_for_each_forward_pass(monkeypatch):
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)
    inject(layer, nn.MultiheadAttention, r=2, variant="dora")  # which no product is made with
    randomize_adapters(layer, 0.5)
    kind, computed = type(layer.lora_adapters[0].kind), []
    update = kind.update

    def counting(self, *arguments):
        computed.append(arguments)
        return update(self, *arguments)

    monkeypatch.setattr(kind, "update", counting)
    for passes in (1, 2):
        layer(x, x, x)[0].sum().backward()  # no graph is kept from one pass to the next
        assert len(computed) == passes
    layer.in_proj_weight, layer.in_proj_weight  # noqa: B018 (outside of a pass, at each reading)
    assert len(computed) == 4
    with pytest.raises(AssertionError, match="does not match"):
        layer(x, x, x[..., :4])
    assert "_lora_inject_computed" not in vars(layer)


def test_threads_do_not_share_what_a_forward_pass_computed():
    entered, leave = [threading.Event(), threading.Event()], threading.Event()

    class Waiting(nn.Linear):
        """Lets the second thread come in while the first one is inside, and leave after it."""

        def forward(self, x):
            number = int(threading.current_thread().name)
            entered[number].set()
            assert (entered[1] if number == 0 else leave).wait(20)
            return super().forward(x)

    model = nn.Sequential(Waiting(4, 4))
    inject(model, Waiting, r=2, how="weight")
    threads = [threading.Thread(target=model, args=(torch.ones(3, 4),), name=n) for n in "01"]
    threads[0].start()
    assert entered[0].wait(20)
    threads[1].start()
    threads[0].join()
    leave.set()
    threads[1].join()
    before = model[0].weight.clone()
    randomize_adapters(model)
    assert not torch.equal(model[0].weight, before)
    strip(model)
    assert not [name for name in vars(model[0]) if "lora" in name]


class Parent(nn.Module):
    """Reads the weight of one child, asks facts of another, and calls a third."""

    def __init__(self):
        super().__init__()
        self.read, self.asked, self.called = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.called(self.asked(x))


def test_a_weight_that_a_parent_reads_is_found_in_its_code():
    model, x = nn.Sequential(Parent()), torch.randn(2, 4)
    ways = {site.path: site.way for site in plan(model).sites}
    assert ways == {"0.read": "weight", "0.asked": "branch", "0.called": "branch"}
    inject(model, r=1)
    randomize_adapters(model)
    model(x).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_a_grandparent_reads_too():
    class Grandparent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
            self.block = Parent()

        def forward(self, x):
            return [self.block.called.weight @ row for row in x]

    ways = {site.path: site.way for site in plan(Grandparent()).sites}
    assert ways["block.called"] == "weight"
    assert ways["inner.proj"] == "branch"


def test_wavlm_trains_its_projections():
    import transformers as tf

    config = tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = tf.WavLMModel(config).eval()
    inject(model, ["q_proj", "v_proj"], r=2)
    model(torch.randn(1, 400))[0].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_recurrent_layers_with_normed_weights_are_refused():
    normed = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    pruned = nn.LSTMCell(4, 4)
    prune.l1_unstructured(pruned, "weight_hh", 0.5)
    for layer in (normed, pruned):
        with pytest.raises(UnsupportedLayerError, match="normed, pruned"):
            inject(nn.Sequential(layer), "0")


def test_attention_with_a_pruned_weight_is_refused_and_left_by_all_linear():
    attention = nn.MultiheadAttention(4, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    model = nn.ModuleDict({"attention": attention, "up": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match="normed, pruned"):
        inject(model, "attention")
    assert "attention" in {skip.path for skip in plan(model).skipped if skip.wanted}


def test_subclasses_with_another_forward_are_refused():
    class OddLSTM(nn.LSTM):
        def forward(self, x):
            return torch.tanh(x @ self.weight_ih_l0.T)

    class OddAttention(nn.MultiheadAttention):
        def forward(self, x):
            return x

    for layer in (OddLSTM(4, 4), OddAttention(4, 2)):
        with pytest.raises(UnsupportedLayerError, match="has a forward"):
            inject(nn.Sequential(layer), "0")
