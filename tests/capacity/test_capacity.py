"""Capacity on paper: activations against real measurements, sums against real shards."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from families import FAMILIES
from helpers import changed_parts, snapshot
from products import held
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from benchmarks.quality import peak
from lora_inject import LoRAInjectError, capacity, inject
from lora_inject.capacity import activations

pytestmark = pytest.mark.cpu("what is counted is measured on it")

DECODER = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BATCH, SEQ = 2, 96


def llama(**changes):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | changes))


def mixtral(experts="eager", **changes):
    config = tf.MixtralConfig(
        **DECODER | {"num_local_experts": 4, "experts_implementation": experts} | changes
    )
    return tf.MixtralForCausalLM(config)


def gpt2(dropout=0.0, attention="sdpa"):
    config = tf.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=3, n_head=4, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, attn_implementation=attention,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def bert(dropout=0.0):
    config = tf.BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=160, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return tf.BertForMaskedLM(config)


def t5():
    config = tf.T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def measured(model, **inputs):
    """Bytes that the graph of a forward pass really holds, by the allocator of the CPU.

    Hooks on what is saved would switch some savings off.
    """

    def graph():
        output = model.train()(**{name: value.clone() for name, value in inputs.items()})
        return getattr(output, "loss", output).grad_fn  # and nothing else of what is returned

    graph()  # what is made at the first call
    return held(graph)


def tokens():
    ids = torch.randint(256, (BATCH, SEQ))
    return {"input_ids": ids, "labels": ids}


BUILDS = {
    "llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "bert in bfloat16": lambda: bert().to(torch.bfloat16),
    "mixtral in bfloat16": lambda: mixtral().to(torch.bfloat16),
    "llama": llama,
    "gpt2": gpt2,
    "gpt2 with eager attention": lambda: gpt2(attention="eager"),
    "bert": bert,
    "mixtral": mixtral,
    "mixtral with grouped experts": lambda: mixtral("grouped_mm"),
    "t5": t5,
}


@pytest.mark.parametrize("name", BUILDS)
def test_activations_are_those_of_a_real_forward(name):
    model = BUILDS[name]()
    inject(model, r=4)
    model.config.use_cache = False
    needed = capacity(model, batch=BATCH, seq=SEQ)
    assert needed.activations == pytest.approx(measured(model, **tokens()), rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_of_a_model_that_trains_in_full(name):
    model = BUILDS[name]()
    model.config.use_cache = False
    needed = capacity(model, batch=BATCH, seq=SEQ)
    assert needed.activations == pytest.approx(measured(model, **tokens()), rel=0.1)
    assert needed.adapters == 0


@pytest.mark.parametrize(("build", "targets"), [(gpt2, "c_attn"), (bert, ["query", "value"])])
def test_dropout_keeps_a_byte_for_each_element_as_on_accelerators(build, targets, monkeypatch):
    model = build(dropout=0.1)
    model.config.use_cache = False
    inject(model, targets, r=4, dropout=0.1)
    needed = capacity(model, batch=BATCH, seq=SEQ)

    def fused(q, k, v, attn_mask=None, dropout_p=0.0, **options):  # CPUs drop out step by step
        return attention(q, k, v, attn_mask, **options)

    def with_a_mask(x, p, training=True, inplace=False):
        return torch.native_dropout(x, p, training)[0]

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(F, "dropout", with_a_mask)
    assert needed.activations == pytest.approx(measured(model, **tokens()), rel=0.1)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


def test_an_adapted_layer_keeps_x_once_and_a_product_for_each_adapter():
    model, x_NI = Projections(), torch.randn(512, 64)
    inject(model, ["q"], r=4)
    assert capacity(model, x_NI).activations == 4 * (512 * 64 + 512 * 4)
    inject(model, ["k", "v"], r=4)
    assert capacity(model, x_NI).activations == 4 * (512 * 64 + 3 * 512 * 4)
    # A CPU keeps B in another order of its elements besides.
    assert capacity(model, x_NI).activations == pytest.approx(measured(model, x=x_NI), rel=0.1)


def test_dropout_of_adapters_keeps_a_copy_and_a_mask_on_accelerators_and_nothing_on_a_cpu():
    plain, model, x_NI = Projections(), Projections(), torch.randn(512, 64, requires_grad=True)
    inject(plain, "re:.*", r=4)
    inject(model, "re:.*", r=4, dropout=0.1)
    without = capacity(plain, x_NI).activations
    assert capacity(model, x_NI).activations == without + 512 * 64 * (3 * (4 + 1) - 4)
    assert without == pytest.approx(measured(model, x=x_NI), rel=0.1)


class Gated(nn.Module):
    """The MLP of a Llama; others may read its product, too."""

    def __init__(self, then=lambda x: x, besides=False):
        super().__init__()
        self.gate, self.up = nn.Linear(64, 160), nn.Linear(64, 160)
        self.down = nn.Linear(160, 64)
        self.then, self.besides = then, besides

    def forward(self, x):
        product = self.then(F.silu(self.gate(x)) * self.up(x))
        y = self.down(product)
        return y + product.square().mean() if self.besides else y


def shifted(x):
    with torch.no_grad():
        return x.add_(1)


@pytest.mark.parametrize(
    ("arguments", "products"),
    [
        ({}, 3),  # gate, silu(gate) and up
        ({"besides": True}, 4),
        ({"then": torch.tanh}, 4),
        ({"then": shifted}, 4),
    ],
)
def test_the_product_of_a_gated_mlp_is_made_again_where_nobody_else_reads_it(arguments, products):
    model, x_NI = Gated(**arguments), torch.randn(512, 64)
    inject(model, ["gate", "up", "down"], r=4)
    needed = capacity(model, x_NI).activations
    assert needed // (4 * 512 * 160) == products
    assert needed == pytest.approx(measured(model, x=x_NI), rel=0.02)


def test_where_torch_does_not_tell_of_hooks_the_product_is_kept(monkeypatch):
    model, x_NI = Gated(), torch.randn(512, 64)
    inject(model, ["gate", "up", "down"], r=4)
    told = capacity(model, x_NI).activations
    monkeypatch.setattr(activations, "tells_of_hooks", False)
    assert capacity(model, x_NI).activations == told + 4 * 512 * 160


@pytest.mark.parametrize("vocab_size", [256, 4000])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_the_total_is_the_peak_of_a_real_step(build, vocab_size):
    model = build(vocab_size=vocab_size)
    inject(model, r=4)
    model.config.use_cache = False
    needed = capacity(model, batch=BATCH, seq=SEQ, optimizer="sgd")
    inputs = tokens()

    def step():
        output = model(**inputs)
        output.loss.backward()

    before = peak(lambda: torch.empty(1))  # torch goes on counting from former profiles
    most = peak(step) - before
    assert needed.total == pytest.approx(needed.base + needed.adapters + most, rel=0.1)
    working = needed.activations + needed.working + needed.gradients
    assert working == pytest.approx(most, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block():
    model, shorter = llama(), llama(num_hidden_layers=2)
    for m in (model, shorter):
        inject(m, r=4)
        m.config.use_cache = False
    needed = capacity(model, batch=BATCH, seq=SEQ, checkpointing=True)
    one_block = measured(model, **tokens()) - measured(shorter, **tokens())
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    real = measured(model, **tokens()) + one_block
    assert needed.activations == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("build", [llama, mixtral])
def test_a_tensor_parallel_device_keeps_what_a_model_with_half_the_heads_and_features_keeps(build):
    sizes = {"head_dim": 16, "intermediate_size": 160}
    half = {
        "head_dim": 16, "intermediate_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    both = [build(**sizes), build(**half)]
    for model in both:
        inject(model, r=4)
    divided = capacity(both[0], batch=BATCH, seq=SEQ, tp=2)
    small = capacity(both[1], batch=BATCH, seq=SEQ)
    assert (divided.activations, divided.adapters) == (small.activations, small.adapters)
    embedding = both[1].model.embed_tokens.weight.numel() * 4
    assert divided.base == small.base - embedding  # half of it, and of the head, which is as large


@pytest.fixture
def six_ranks():
    """Six ranks of which this process is the first and the others are not there."""
    store = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=6, store=store)
    yield dist.device_mesh.init_device_mesh("cpu", (6,))
    dist.destroy_process_group()


def test_shards_are_those_of_fsdp(six_ranks):
    model = llama().to(torch.bfloat16)
    inject(model, r=4)
    needed = capacity(model, batch=BATCH, seq=SEQ, fsdp=6)
    for block in model.model.layers:
        fully_shard(block, mesh=six_ranks)
    fully_shard(model, mesh=six_ranks)
    held = {True: 0, False: sum(b.numel() * b.element_size() for b in model.buffers())}
    for name, parameter in model.named_parameters():
        held["lora_" in name] += parameter.to_local().numel() * parameter.element_size()
    assert (needed.adapters, needed.base) == (held[True], held[False])
    assert needed.gradients == held[True]
    assert needed.states == 2 * held[True]


def test_fully_shard_gives_whole_experts_to_at_most_as_many_ranks(six_ranks):
    model = mixtral()
    inject(model, r=6)
    needed = capacity(model, batch=BATCH, seq=SEQ, fsdp=6)
    assert any("among as many ranks at most" in note for note in needed.notes)
    fully_shard(model, mesh=six_ranks)
    local = [p.to_local().numel() * p.element_size() for p in model.parameters()]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert needed.base + needed.adapters == sum(local) + buffers


def test_what_is_gathered_is_the_rest_and_two_blocks_and_the_gradients_of_one():
    model = llama()
    inject(model, r=4)
    block = model.model.layers[0]
    in_block = sum(p.numel() for p in block.parameters())
    trained = sum(p.numel() for p in block.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters()) - 3 * in_block
    assert capacity(model, seq=SEQ).gathered == 0
    assert capacity(model, seq=SEQ, fsdp=2).gathered == 4 * (rest + 2 * in_block + trained)


def test_the_smallest_number_of_devices_is_the_smallest():
    with torch.device("meta"):
        config = tf.LlamaConfig(
            num_hidden_layers=16, hidden_size=16384, intermediate_size=53248,
            num_attention_heads=128, num_key_value_heads=8,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    inject(model)
    needed = capacity(model, seq=1024, tp=2, checkpointing=True)
    assert [fit.device for fit in needed.fits] == ["80 GB", "141 GB"]
    for fit in needed.fits:
        assert fit.devices == 2 * fit.fsdp
        for ranks, enough in ((fit.fsdp, True), (fit.fsdp - 1, False)):
            if ranks:
                total = capacity(model, seq=1024, tp=2, checkpointing=True, fsdp=ranks).total
                assert (total <= fit.usable) is enough
        assert fit.total <= fit.usable
    many = capacity(model, seq=1024, batch=1000)
    assert [(fit.fsdp, fit.devices) for fit in many.fits] == [(None, None)] * 2
    assert "none" in str(many)
    assert "use checkpointing" in many.notes[-1]


def test_the_model_stays_as_it_is():
    model = bert()
    model.eval()
    inject(model, r=4)
    before, functions = snapshot(model), [F.dropout, F.scaled_dot_product_attention]
    capacity(model, seq=SEQ, fsdp=4, tp=2)
    assert changed_parts(before, snapshot(model)) == []
    assert functions == [F.dropout, F.scaled_dot_product_attention]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "kept"), [("lora", False), ("dora", True)])
def test_adapted_experts_keep_what_they_are_multiplied_by(variant, kept, dtype):
    model = mixtral("grouped_mm", num_local_experts=16).to(dtype)
    inject(model, ["experts.gate_up_proj", "experts.down_proj"], r=4, variant=variant)
    model.config.use_cache = False
    needed = capacity(model, batch=BATCH, seq=SEQ)
    named = {n: p for n, p in model.named_parameters() if ".experts." in n and "lora_" not in n}
    weights = sum(p.numel() * p.element_size() for p in named.values())
    assert (needed.activations > 2 * weights) is kept  # effective weights
    assert needed.activations == pytest.approx(measured(model, **tokens()), rel=0.01)


def test_a_quantized_base_is_counted_as_it_is_stored_and_unpacked():
    torchao = pytest.importorskip("torchao.quantization")
    model = llama().to(torch.bfloat16)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    model.config.use_cache = False
    inject(model, r=4)
    needed = capacity(model, batch=BATCH, seq=SEQ)
    plain = llama().to(torch.bfloat16)
    inject(plain, r=4)
    in_bf16 = capacity(plain, batch=BATCH, seq=SEQ)
    assert needed.base < 0.65 * in_bf16.base
    assert needed.activations > in_bf16.activations  # torchao keeps unpacked weights
    assert needed.activations == pytest.approx(measured(model, **tokens()), rel=0.1)


def test_attention_of_torch_is_one_kernel_inside_modules_too():
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    inject(model, ["linear1", "linear2", "self_attn"], r=4)
    x = torch.randn(BATCH, SEQ, 64)
    assert capacity(model, x).activations == pytest.approx(measured(model, src=x), rel=0.1)


@pytest.mark.parametrize("family", ["vit", "qwen3_moe"])
def test_other_families_run_without_values(family):
    model = FAMILIES[family].build()
    inject(model, r=2)
    seq = None if family == "vit" else SEQ
    needed = capacity(model, batch=BATCH, seq=seq, tp=2, fsdp=2)
    assert needed.activations > 0
    assert needed.to_dict()["inputs"].keys() <= {"pixel_values", "input_ids", "labels"}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (llama, {}, "seq: this model reads tokens"),
        (llama, {"seq": 0}, "seq must be an integer from 1 to 2,147,483,647, not 0"),
        (llama, {"seq": 8, "batch": 0}, "batch must be an integer"),
        (llama, {"seq": 8, "fsdp": True}, "fsdp must be an integer"),
        (llama, {"seq": 8, "tp": 1.5}, "tp must be an integer"),
        (llama, {"seq": 8, "optimizer": "x"}, "optimizer must be one of"),
        (FAMILIES["vit"].build, {"seq": 8}, "seq: this model reads images"),
        (lambda: nn.Linear(4, 4), {}, "nothing tells what Linear reads"),
        (lambda: nn.Linear(4, 4), {"inputs": torch.zeros(2, 5)}, "cannot run without values"),
        (Branching, {"inputs": torch.zeros(2, 4)}, "Branching cannot run without values"),
    ],
)
def test_what_cannot_be_counted_is_refused(build, arguments, message):
    with pytest.raises(LoRAInjectError, match=message):
        capacity(build(), **arguments)
