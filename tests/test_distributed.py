"""torch's engines for many devices: every case against the same thing in a single process."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import gpt2, llama
from helpers import Net, ids, randomize_adapters
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from lora_inject import (
    LoRAInjectError,
    UnsupportedLayerError,
    combine,
    disabled,
    extract,
    inject,
    load,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge,
    per_row,
    remove,
    report,
    reset_lora_parameters,
    save,
    strip,
    use,
)
from lora_inject.files.formats.storage import read_tensors
from lora_inject.sharding import whole

pytestmark = [pytest.mark.distributed, pytest.mark.cpu("the ranks are processes there")]


def rank():
    return torch.distributed.get_rank()


def my_half(tensor):
    """The rows of a batch that are for this rank."""
    return tensor.chunk(2)[rank() % 2]


def train(model, inputs, targets, steps=3, clip=True):
    """Adam on what trains; returns the adapter, whole."""
    optimizer = torch.optim.Adam(list(lora_parameters(model)), lr=0.01)
    for _ in range(steps):
        output = model(inputs)
        output = output if isinstance(output, torch.Tensor) else output.logits
        optimizer.zero_grad()
        nn.functional.mse_loss(output, targets).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(lora_parameters(model)), 0.05)
        optimizer.step()
    return {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}


def assert_close(one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def assert_same_files(one, other):
    """Two PEFT directories hold the same; safetensors writes its header in any order."""
    config = "adapter_config.json"
    assert (one / config).read_bytes() == (other / config).read_bytes()
    (mine, metadata), (wanted, expected) = (
        read_tensors(folder / "adapter_model.safetensors") for folder in (one, other)
    )
    assert metadata == expected
    assert_close(mine, wanted, 0)


def nets(**arguments):
    """The same adapted model twice, with the inputs and targets of a batch of four."""
    model = Net().double()
    inputs, targets = ids(rows=4), torch.randn(4, 5, 3, dtype=torch.double)
    inject(model, ["q_proj", "v_proj"], r=3, **arguments)
    randomize_adapters(model)
    return copy.deepcopy(model), model, inputs, targets


def shard(model):
    """FSDP2 as in practice: each block a unit, and the whole model one for the rest."""
    blocks = model.model.layers if hasattr(model, "model") else model.layers
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


# DDP


# A variant with a tensor more, a start that is kept beside, and both.
METHODS = [{}, {"variant": "dora"}, {"init": "pissa"}, {"variant": "dora", "init": "olora"}]
IN_THE_WEIGHT = [{"variant": "loha"}, {"variant": "lokr"}]
every_method = pytest.mark.parametrize("method", [*METHODS, *IN_THE_WEIGHT], ids=str)


def ddp_equals_one_process(method):
    alone, model, inputs, targets = nets(bias="lora_only", **method)
    ddp = DistributedDataParallel(model)
    trained = train(ddp, my_half(inputs), my_half(targets))
    assert_close(trained, train(alone, inputs, targets))


def ddp_starts_equal():
    torch.manual_seed(rank())
    model = Net()
    inject(model, ["q_proj"], r=3)
    ddp = DistributedDataParallel(model)
    return [p.detach().numpy() for p in lora_parameters(ddp)]


def ddp_strips():
    model = Net().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, ["q_proj"], r=3, bias="all")
    ddp = DistributedDataParallel(model)
    train(ddp, my_half(ids(rows=4)), torch.randn(2, 5, 3, dtype=torch.double))
    assert strip(ddp) is ddp
    assert type(model.layers[0].q_proj) is nn.Linear
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_method
def test_ddp_on_two_halves_of_a_batch_equals_one_process_on_all_of_it(method):
    on_ranks(2, ddp_equals_one_process, method)


def test_ddp_starts_from_equal_adapters_whatever_the_seeds_of_the_ranks():
    first, second = on_ranks(2, ddp_starts_equal)
    assert all((one == other).all() for one, other in zip(first, second, strict=True))


def test_strip_through_ddp_gives_back_the_model():
    on_ranks(2, ddp_strips)


# FSDP2


def fsdp_llama_equals_one_process(folder, method):
    alone = llama().double()
    inject(alone, ["q_proj", "v_proj", "down_proj"], r=3, **method)
    randomize_adapters(alone)
    model = shard(copy.deepcopy(alone))
    inputs, targets = ids(rows=4, vocabulary=60), torch.randn(4, 5, 64, dtype=torch.double)
    trained = train(model, my_half(inputs), my_half(targets))
    assert_close(trained, train(alone, inputs, targets))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name and not name.endswith("0"))
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert isinstance(parameter, DTensor)

    load_lora_state_dict(alone, trained)
    if rank() == 0:
        save(alone, f"{folder}/alone")
    gathered = []
    own, DTensor.full_tensor = DTensor.full_tensor, lambda t, **k: gathered.append(t) or own(t, **k)
    try:
        save(model, f"{folder}/sharded")
    finally:
        DTensor.full_tensor = own
    largest = max(tensor.numel() for tensor in trained.values())
    assert gathered
    assert all(tensor.numel() <= largest for tensor in gathered)


def fsdp_mixed_dtypes(dtype, bias):
    alone = Net(dtype=torch.bfloat16)
    inject(alone, ["q_proj", "v_proj"], r=3, dtype=dtype, bias=bias)
    randomize_adapters(alone)
    model = shard(copy.deepcopy(alone))
    inputs, targets = ids(rows=4), torch.randn(4, 5, 3).bfloat16()
    # Both ranks have the whole batch: the mean of equal gradients is exact.
    trained, wanted = (train(m, inputs, targets, clip=False) for m in (model, alone))
    assert all(torch.equal(trained[name], wanted[name]) for name in wanted)
    return {str(tensor.dtype) for tensor in trained.values()}


def fsdp_dropout(dtype):
    alone = Net(dtype=dtype)
    inject(alone, ["q_proj", "v_proj"], r=3, dropout=0.5)
    randomize_adapters(alone)
    model = shard(copy.deepcopy(alone))
    inputs, targets = ids(rows=512), torch.randn(512, 5, 3).to(dtype)
    trained = []
    for one in (model, alone):
        torch.manual_seed(3)
        trained.append(train(one, inputs, targets, clip=False))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[1])


def fsdp_two_trained_dtypes():
    model = Net(dtype=torch.bfloat16)
    inject(model, ["q_proj"], r=3, bias="lora_only")
    shard(model)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(ids())


def fsdp_refuses():
    _, model, inputs, _ = nets()
    shard(model)
    expected, classes = model(inputs), [type(m) for m in model.modules()]
    refusals = [
        strip, merge, lambda m: strip(m, merge=True), lambda m: remove(m, "default"),
        lambda m: combine(m, {"default": 0.5}, "half"),
    ]  # fmt: skip
    for refused in refusals:
        with pytest.raises(LoRAInjectError, match="shard"):
            refused(model)
    for targets in (["k_proj"], "all-linear"):
        with pytest.raises(LoRAInjectError, match="Inject before fully_shard"):
            inject(model, targets, adapter="other")
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(inputs), expected)


def fsdp_switches(each_layer):
    model = Net().double()
    base, inputs = copy.deepcopy(model), ids(rows=4)
    targets = torch.randn(4, 5, 3, dtype=torch.double)
    inject(model, ["q_proj", "v_proj"], r=3, adapter="fr")
    inject(model, ["v_proj"], r=2, adapter="de")
    randomize_adapters(model)
    alone = copy.deepcopy(model)
    if each_layer:
        for block in model.layers:
            fully_shard(block.q_proj)
            fully_shard(block.v_proj)
    shard(model)
    for names in (["fr"], ["de"], ["fr", "de"]):
        use(model, *names)
        use(alone, *names)
        assert torch.equal(model(inputs), alone(inputs))
        with disabled(model):
            assert torch.equal(model(inputs), base(inputs))
    use(model, "fr", "de", train="de")
    use(alone, "fr", "de", train="de")
    for one in (model, alone):
        nn.functional.mse_loss(one(inputs), targets).backward()
    for mine, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        assert (mine.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad, rtol=0, atol=1e-10)


def fsdp_asleep():
    _, model, inputs, _ = nets()
    use(model)
    expected = model(inputs)
    for block in model.layers:
        fully_shard(block.q_proj)
    shard(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(LoRAInjectError, match="became FSDPLinear while none of its adapters"):
        use(model, "default")
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(inputs), expected)


def fsdp_loads(folder):
    alone, model, inputs, _ = nets(bias="lora_only")
    with torch.no_grad():
        for parameter in lora_parameters(alone):
            parameter.normal_()
    if rank() == 0:
        save(alone, folder)
    torch.distributed.barrier()
    shard(model)
    own = list(lora_parameters(model))
    load(model, folder)
    assert all(one is other for one, other in zip(own, lora_parameters(model), strict=True))
    assert_close(lora_state_dict(model), lora_state_dict(alone), 0)
    assert torch.equal(model(inputs), alone(inputs))
    with pytest.raises(LoRAInjectError, match="FSDP manages"), disabled(model):
        pass  # which would show former biases
    assert torch.equal(model(inputs), alone(inputs))
    with torch.no_grad():
        other = Net().double()
        other.load_state_dict({name: value + 1 for name, value in other.state_dict().items()})
    inject(other, ["q_proj", "v_proj"], r=3, bias="lora_only")
    with pytest.raises(LoRAInjectError, match="not those that the adapter was made for"):
        load(shard(other), folder)


def fsdp_from_meta(method):
    base = Net().double()
    alone = copy.deepcopy(base)
    inject(alone, ["q_proj", "v_proj"], r=3, seed=5, **method)
    with torch.device("meta"):
        model = Net().double()
    inject(model, ["q_proj", "v_proj"], r=3, seed=5, **method)
    shard(model)
    model.to_empty(device="cpu")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in base.state_dict().items():
            mesh, placements = own[name].device_mesh, own[name].placements
            own[name].copy_(torch.distributed.tensor.distribute_tensor(value, mesh, placements))
    reset_lora_parameters(model)
    assert_close(lora_state_dict(model), lora_state_dict(alone), 0)
    assert str(report(model)).replace("FSDPNet", "Net") == str(report(alone))
    inputs = ids()
    assert torch.equal(model(inputs), alone(inputs))


def fsdp_adapts_weights():
    alone = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    inject(alone, "all-linear", r=2)
    randomize_adapters(alone)
    model = fully_shard(copy.deepcopy(alone))
    inputs = torch.randn(4, 3, 8, dtype=torch.double)
    trained = train(model, my_half(inputs), my_half(inputs))
    assert_close(trained, train(alone, inputs, inputs))


@every_method
def test_fsdp2_trains_a_llama_as_one_process_and_saves_the_same_files(method, tmp_path):
    on_ranks(2, fsdp_llama_equals_one_process, str(tmp_path), method)
    assert_same_files(tmp_path / "sharded", tmp_path / "alone")


@pytest.mark.parametrize(
    ("dtype", "bias", "trains"),
    [(None, "none", "torch.float32"), ("base", "lora_only", "torch.bfloat16")],
)
def test_fsdp2_over_a_bfloat16_base(dtype, bias, trains):
    assert on_ranks(2, fsdp_mixed_dtypes, dtype, bias) == [{trains}] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp2_gathers_again_what_the_backward_pass_of_dropout_needs(dtype):
    on_ranks(2, fsdp_dropout, dtype)


def test_layers_that_fsdp2_took_over_while_no_adapter_was_in_use_refuse_to_use_one():
    on_ranks(2, fsdp_asleep)


def test_torch_says_so_where_two_dtypes_train_in_a_unit_of_fsdp2():
    on_ranks(2, fsdp_two_trained_dtypes)


def test_under_fsdp2_what_would_change_a_sharded_model_is_refused():
    on_ranks(2, fsdp_refuses)


@pytest.mark.parametrize("each_layer", [False, True])
def test_under_fsdp2_adapters_can_be_switched_and_disabled(each_layer):
    on_ranks(2, fsdp_switches, each_layer)


def test_a_peft_directory_is_loaded_into_an_fsdp2_model_and_its_base_is_checked(tmp_path):
    on_ranks(2, fsdp_loads, str(tmp_path))


@every_method
def test_from_meta_through_fsdp2_come_the_starting_values_of_one_process(method):
    on_ranks(2, fsdp_from_meta, method)


def test_fsdp2_trains_layers_that_are_adapted_in_their_weight():
    on_ranks(2, fsdp_adapts_weights)


# FSDP1


def fsdp1_equals_one_process(dtype, how="auto"):
    alone = Net(dtype=dtype)
    inject(alone, ["q_proj", "v_proj"], r=3, dtype="base", how=how)
    randomize_adapters(alone)
    bare = copy.deepcopy(alone)
    model = FullyShardedDataParallel(bare, use_orig_params=True, device_id=torch.device("cpu"))
    inputs, targets = ids(rows=4), torch.randn(4, 5, 3).to(dtype)
    optimizers = [torch.optim.Adam(list(lora_parameters(m)), lr=0.01) for m in (model, alone)]
    halves = (model, my_half(inputs), my_half(targets)), (alone, inputs, targets)
    for optimizer, (net, x, y) in zip(optimizers, halves, strict=True):
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    with pytest.raises(LoRAInjectError, match="summon_full_params"):
        lora_state_dict(model)
    with FullyShardedDataParallel.summon_full_params(model):
        trained = {name: value.clone() for name, value in lora_state_dict(model).items()}
    assert_close(trained, lora_state_dict(alone))
    for refused in (strip, merge):
        with pytest.raises(LoRAInjectError, match="shard"):
            refused(model)
    with pytest.raises(LoRAInjectError, match="Inject before fully_shard or FSDP"):
        inject(model, ["k_proj"], adapter="other")


def fsdp1_mixed_dtypes():
    model = Net(dtype=torch.bfloat16)
    inject(model, ["q_proj"], r=3)
    with pytest.raises(ValueError, match="uniform dtype"):  # torch's, and it says what
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def test_fsdp1_with_use_orig_params_takes_the_step_of_one_process():
    on_ranks(2, fsdp1_equals_one_process, torch.float64)
    on_ranks(2, fsdp1_equals_one_process, torch.float64, "weight")
    on_ranks(2, fsdp1_mixed_dtypes)


# Tensor parallelism


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()


TENSOR_PARALLEL = {
    "*.self_attn.q_proj": ColwiseParallel, "*.self_attn.k_proj": ColwiseParallel,
    "*.self_attn.v_proj": ColwiseParallel, "*.self_attn.o_proj": RowwiseParallel,
    "*.mlp.gate_proj": ColwiseParallel, "*.mlp.up_proj": ColwiseParallel,
    "*.mlp.down_proj": RowwiseParallel,
}  # fmt: skip


def parallelize(model, mesh):
    return parallelize_module(
        model, mesh, {f"model.layers.{name}": style() for name, style in TENSOR_PARALLEL.items()}
    )


def placed(model):
    """The placements of every A and B, and of their weights."""
    return {
        name: (module.weight.placements, module.lora_A.placements, module.lora_B.placements)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(module.weight, DTensor)
    }


def tp_llama(order, folder):
    base = llama().double()
    alone = copy.deepcopy(base)
    inject(alone, "all-linear", r=3, seed=7)
    mesh = init_device_mesh("cpu", (2,))
    if order == "inject first":
        inject(base, "all-linear", r=3, seed=7)
    parallelize(base, mesh)
    if order == "parallelize first":
        inject(base, "all-linear", r=3, seed=7)
    assert_close(lora_state_dict(base), lora_state_dict(alone), 0)
    column = (Shard(0),), (Replicate(),), (Shard(0),)
    row = (Shard(1),), (Shard(1),), (Replicate(),)
    found = placed(base)
    assert len(found) == 2 * 7
    for name, placements in found.items():
        assert placements == (row if name.endswith(("o_proj", "down_proj")) else column)
    for name, parameter in base.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)

    randomize_adapters(alone)
    load_lora_state_dict(base, lora_state_dict(alone))
    inputs, targets = ids(rows=4, vocabulary=60), torch.randn(4, 5, 64, dtype=torch.double)
    torch.testing.assert_close(base(inputs).logits, alone(inputs).logits, rtol=0, atol=1e-10)
    for model in (base, alone):
        nn.functional.mse_loss(model(inputs).logits, targets).backward()
    for mine, wanted in zip(lora_parameters(base), lora_parameters(alone), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad, rtol=0, atol=1e-10)
    assert_close(train(base, inputs, targets), train(alone, inputs, targets))

    load_lora_state_dict(base, lora_state_dict(alone))
    use(base)
    use(alone)
    with pytest.raises(LoRAInjectError, match="is sharded"):
        extract(base, alone, ["q_proj"], r=2, adapter="x")
    use(base, "default")
    use(alone, "default")
    if rank() == 0:
        save(alone, f"{folder}/alone")
    save(base, f"{folder}/sharded")
    before = {name: id(p) for name, p in base.named_parameters() if ".lora_" not in name}
    with pytest.raises(LoRAInjectError, match="sharded, and no rank holds it whole"):
        merge(base)
    strip(base)
    assert {name: id(p) for name, p in base.named_parameters()} == before
    load(base, f"{folder}/alone")
    assert_close(lora_state_dict(base), lora_state_dict(alone), 0)


@pytest.mark.parametrize("order", ["inject first", "parallelize first"])
def test_a_tensor_parallel_llama_equals_one_process_and_saves_the_same_files(order, tmp_path):
    on_ranks(2, tp_llama, order, str(tmp_path))
    assert_same_files(tmp_path / "sharded", tmp_path / "alone")


def tp_embedding(style, order, A, B):
    base = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4)).double()
    alone = copy.deepcopy(base)
    inject(alone, nn.Embedding, r=3, seed=7)
    layout = style(input_layouts=Replicate(), output_layouts=Replicate())
    if order == "inject first":
        inject(base, nn.Embedding, r=3, seed=7)
    parallelize_module(base, init_device_mesh("cpu", (2,)), {"0": layout})
    if order == "parallelize first":
        inject(base, nn.Embedding, r=3, seed=7)
    assert (base[0].lora_A.placements, base[0].lora_B.placements) == ((A,), (B,))
    randomize_adapters(alone)
    load_lora_state_dict(base, lora_state_dict(alone))
    inputs, targets = ids(rows=4, vocabulary=10), torch.randn(4, 5, 4, dtype=torch.double)
    assert_close(train(base, inputs, targets), train(alone, inputs, targets))


def parallel_mlp(model):
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), styles)


def tp_several(order):
    """Two adapters, one with parts and one with trained biases: switched, disabled and stripped."""
    base = mlp()
    former = {name: value.clone() for name, value in base.state_dict().items()}
    alone = copy.deepcopy(base)
    for model in (alone, base):
        if model is base and order == "parallelize first":
            parallel_mlp(model)
        inject(model, nn.Linear, adapter="fr", r=1, seed=7, parts={"0": (("q", 3), (None, 5))})
        inject(model, nn.Linear, adapter="de", r=2, seed=8)
        inject(model, nn.Linear, adapter="b", r=2, seed=9, bias="lora_only")
        if model is base and order == "inject first":
            parallel_mlp(model)
    inputs, targets = (torch.randn(4, 6, dtype=torch.double) for _ in range(2))
    use(alone, "b")
    use(base, "b")
    assert_close(train(base, inputs, targets), train(alone, inputs, targets))
    for name in ("fr", "de"):
        randomize_adapters(alone, names=[name])
        load_lora_state_dict(base, lora_state_dict(alone, adapter=name), adapter=name)
    for names in (["fr"], ["de"], ["fr", "de"], [{"fr": 0.7, "de": 0.3}], ["b"]):
        use(alone, *names)
        use(base, *names)
        torch.testing.assert_close(base(inputs), alone(inputs), rtol=0, atol=1e-10)
    for how in ("cat", "svd"):
        for model in (alone, base):
            combine(model, {"fr": 0.7, "de": 0.3}, how, how=how)
            use(model, how)
        assert base[2].get_parameter(f"lora_A_{how}").placements == (Shard(1),)
        torch.testing.assert_close(base(inputs), alone(inputs), rtol=0, atol=1e-10)
    with disabled(base), disabled(alone):
        torch.testing.assert_close(base(inputs), alone(inputs), rtol=0, atol=1e-10)
    strip(base)
    assert_close({n: p.full_tensor() for n, p in base.named_parameters()}, former, 0)


def tp_communication():
    """How often ranks talk in a forward pass, without and with adapters."""
    counts = []
    for adapted in (False, True):
        model = parallel_mlp(mlp())
        if adapted:
            inject(model, nn.Linear, r=2)
        with CommDebugMode() as talk:
            model(torch.randn(4, 6, dtype=torch.double))
        counts.append(talk.get_total_counts())
    return counts


def tp_rows():
    base = mlp()
    for name, r in (("fr", 2), ("de", 3)):
        inject(base, nn.Linear, r=r, adapter=name)
    randomize_adapters(base)
    alone = copy.deepcopy(base)
    parallel_mlp(base)
    inputs, names = torch.randn(3, 6, dtype=torch.double), ["fr", None, "de"]
    with per_row(base, names), per_row(alone, names):
        torch.testing.assert_close(base(inputs), alone(inputs), rtol=0, atol=1e-10)


def tp_of_unequal_seeds():
    torch.manual_seed(rank())
    model = parallel_mlp(mlp())
    inject(model, nn.Linear, r=2)
    assert model[0].lora_A.placements == (Replicate(),)
    return model[0].lora_A.to_local().detach().numpy()


def tp_from_meta():
    torch.manual_seed(0)
    base = mlp()
    alone = copy.deepcopy(base)
    inject(alone, nn.Linear, r=3, seed=5)
    with torch.device("meta"):
        model = mlp()
    parallel_mlp(model)
    inject(model, nn.Linear, r=3, seed=5)
    model.to_empty(device="cpu")
    reset_lora_parameters(model)
    assert_close(lora_state_dict(model), lora_state_dict(alone), 0)


def tp_of_transformers(folder):
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": "2"}
    mesh = init_device_mesh("cpu", (2,))
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh)
    with pytest.raises(LoRAInjectError, match="use parallelize_module"):
        inject(model, ["q_proj"], r=2)


def fsdp_rows(tied, folder):
    alone = llama().double()
    if tied:
        alone.lm_head.weight = alone.model.embed_tokens.weight
        alone.config.tie_word_embeddings = True
    rows = {"embed_tokens": [3, 40, 7], "lm_head": [3, 40, 7]}
    inject(alone, "q_proj", r=3, rows=rows)
    randomize_adapters(alone)
    model = shard(copy.deepcopy(alone))
    inputs, targets = ids(rows=4, vocabulary=60), torch.randn(4, 5, 64, dtype=torch.double)
    trained = train(model, my_half(inputs), my_half(targets))
    assert_close(trained, train(alone, inputs, targets))
    assert any("lora_rows" in name for name in trained)
    load_lora_state_dict(alone, trained)
    if rank() == 0:
        save(alone, f"{folder}/alone")
    save(model, f"{folder}/sharded")


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_trains_rows_of_tables_as_one_process_and_saves_the_same_files(tied, tmp_path):
    on_ranks(2, fsdp_rows, tied, str(tmp_path))
    assert_same_files(tmp_path / "sharded", tmp_path / "alone")


def tp_tables():
    mesh, model = init_device_mesh("cpu", (2,)), nn.Sequential(nn.Embedding(8, 4))
    inject(model, (), rows={"0": [1]})
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(LoRAInjectError, match=r"0: its adapter .* is a set of rows.*whole"):
            parallelize_module(model, mesh, {"0": style})
    sharded = parallelize_module(nn.Sequential(nn.Embedding(8, 4)), mesh, {"0": RowwiseParallel()})
    with pytest.raises(UnsupportedLayerError, match=r"0: rows= needs its whole weight.*before"):
        inject(sharded, (), rows={"0": [1]})


def test_tables_of_which_rows_train_are_not_divided_by_tensor_parallelism():
    on_ranks(2, tp_tables)


def tp_methods(method):
    alone = mlp()
    inject(alone, "0", r=3, **method)
    with torch.no_grad():
        for parameter in lora_parameters(alone):
            parameter.add_(0.2)
    model = copy.deepcopy(alone)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    inputs = torch.randn(5, 6, dtype=torch.double)
    outputs = [m[0](inputs) for m in (model, alone)]
    torch.testing.assert_close(outputs[0], my_half(outputs[1].T).T, rtol=0, atol=1e-10)
    outputs[1].square().sum().backward()
    outputs[0].square().sum().backward()
    for mine, wanted in zip(lora_parameters(model), lora_parameters(alone), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), wanted.grad, rtol=0, atol=1e-10)
    assert_close(lora_state_dict(model), lora_state_dict(alone), 0)
    for each in (model, alone):
        reset_lora_parameters(each)
    assert_close(lora_state_dict(model), lora_state_dict(alone), 0)
    inject(alone, "2", r=3, **method)
    if "variant" in method:
        with pytest.raises(LoRAInjectError, match=r"2: its adapter .* is a dora.*whole rows"):
            parallelize_module(alone, init_device_mesh("cpu", (2,)), {"2": RowwiseParallel()})
    twin = parallelize_module(mlp(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(UnsupportedLayerError, match=r"0: .* needs its whole weight.*before"):
        inject(twin, "0", r=3, **method)


@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_methods_on_a_layer_that_is_parallel_by_columns(method):
    on_ranks(2, tp_methods, method)


def tp_refuses():
    model = mlp()
    inject(model, nn.Linear, r=2, how="weight")
    with pytest.raises(LoRAInjectError, match="acts in its weight"):
        parallel_mlp(model)
    model = parallel_mlp(mlp())
    with pytest.raises(UnsupportedLayerError, match="only the branch of a matrix can follow"):
        inject(model, nn.Linear, r=2, how="weight")
    assert not hasattr(model[0], "lora_A")
    tied = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    tied[1].weight = tied[0].weight
    inject(tied, ["0"], r=2)
    styles = {"0": RowwiseParallel(input_layouts=Replicate()), "1": ColwiseParallel()}
    with pytest.raises(LoRAInjectError, match="1: it is tied to 0"):
        parallelize_module(tied, init_device_mesh("cpu", (2,)), styles)


@pytest.mark.parametrize("order", ["inject first", "parallelize first"])
def test_tensor_parallel_embeddings_equal_one_process(order):
    on_ranks(2, tp_embedding, ColwiseParallel, order, Replicate(), Shard(0))
    on_ranks(2, tp_embedding, RowwiseParallel, order, Replicate(), Replicate())


@pytest.mark.parametrize("order", ["inject first", "parallelize first"])
def test_several_adapters_of_a_tensor_parallel_model_are_switched_and_stripped(order):
    on_ranks(2, tp_several, order)


def test_adapters_add_no_communication_to_a_tensor_parallel_forward_pass():
    assert on_ranks(2, tp_communication) == [[1, 1]] * 2


def test_rows_with_an_adapter_each_in_a_tensor_parallel_model():
    on_ranks(2, tp_rows)


def fsdp_from_state_dict(rank_of_adapter):
    """A model built on meta, and filled by torch's own functions."""
    whole_model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 6, batch_first=True))
    inject(whole_model, nn.Linear, r=rank_of_adapter)
    randomize_adapters(whole_model)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 6, batch_first=True))
    inject(model, nn.Linear, r=rank_of_adapter)
    fully_shard(model)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole_model.state_dict(), options=options)
    model.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(model(x)[0], whole_model(x)[0])
    optimizer = torch.optim.AdamW(lora_parameters(model))
    model(x)[0].sum().backward()
    optimizer.step()


@pytest.mark.parametrize("rank_of_adapter", [1, 2])
def test_torch_fills_an_fsdp2_model_that_was_built_on_meta(rank_of_adapter):
    on_ranks(2, fsdp_from_state_dict, rank_of_adapter)


def fsdp_lstm():
    torch.manual_seed(0)
    model = nn.LSTM(4, 6, batch_first=True)
    inject(model, nn.LSTM, r=2)
    randomize_adapters(model)
    alone = copy.deepcopy(model)
    fully_shard(model)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(model(x)[0], alone(x)[0])
    model(x)[0].square().sum().backward()
    alone(x)[0].square().sum().backward()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole(model.get_parameter(name).grad), parameter.grad)


def test_fsdp2_shards_an_adapted_lstm():
    on_ranks(2, fsdp_lstm)


def tp_reset():
    torch.manual_seed(rank())
    model = nn.Sequential(nn.Linear(6, 8))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    inject(model, "0", r=2)
    before = lora_state_dict(model)
    reset_lora_parameters(model)
    return [model[0].lora_A.to_local().detach(), before["0.lora_A"]]


def test_resetting_gives_all_tensor_parallel_ranks_the_values_of_the_first():
    (A, first), (other, _) = on_ranks(2, tp_reset)
    assert torch.equal(A, other)
    assert torch.equal(A, first)


def test_tensor_parallel_ranks_agree_on_starting_values_whatever_their_seeds():
    first, second = on_ranks(2, tp_of_unequal_seeds)
    assert (first == second).all()


def test_a_tensor_parallel_model_on_meta_gets_the_starting_values_of_one_process():
    on_ranks(2, tp_from_meta)


def test_transformers_own_tensor_parallelism_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    on_ranks(2, tp_of_transformers, str(tmp_path))


def test_what_tensor_parallelism_cannot_do_is_refused():
    on_ranks(2, tp_refuses)


# Distributed checkpoints


def checkpoint(sharded, action, folder):
    """Save an adapter with values 0, 1, ... or load it and check them; in shards, or whole."""
    import torch.distributed.checkpoint as dcp

    model = Net().double()
    inject(model, ["q_proj", "v_proj"], r=3, bias="lora_only")
    with torch.no_grad():
        for i, parameter in enumerate(lora_parameters(model)):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + 100.0 * i)
    wanted = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    if action == "load":
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.zero_()
    if sharded:
        shard(model)
    state = lora_state_dict(model, full=False)
    assert all(isinstance(tensor, DTensor) == sharded for tensor in state.values())
    everything = get_model_state_dict(model)
    assert all(torch.equal(whole(state[name]), whole(everything[name])) for name in state)
    if action == "save":
        dcp.save(state, checkpoint_id=folder, no_dist=not sharded)
        return
    dcp.load(state, checkpoint_id=folder, no_dist=not sharded)
    load_lora_state_dict(model, state)
    assert_close(lora_state_dict(model), wanted, 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it should be
def test_a_distributed_checkpoint_of_two_ranks_is_loaded_by_one_and_back(tmp_path):
    on_ranks(2, checkpoint, True, "save", str(tmp_path / "two"))
    checkpoint(False, "load", str(tmp_path / "two"))
    checkpoint(False, "save", str(tmp_path / "one"))
    on_ranks(2, checkpoint, True, "load", str(tmp_path / "one"))


# Four processes: data parallel x tensor parallel


def two_by_two(order, folder):
    alone = llama().double()
    inject(alone, "all-linear", r=4, seed=7)
    randomize_adapters(alone)
    model = copy.deepcopy(alone)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if order == "parallelize first":
        strip(model)
    parallelize(model, mesh["tp"])
    if order == "parallelize first":
        inject(model, "all-linear", r=4, seed=7)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    load_lora_state_dict(model, lora_state_dict(alone))
    inputs, targets = ids(rows=4, vocabulary=60), torch.randn(4, 5, 64, dtype=torch.double)
    half = mesh["dp"].get_local_rank()
    trained = train(model, inputs.chunk(2)[half], targets.chunk(2)[half])
    assert_close(trained, train(alone, inputs, targets))
    save(model, f"{folder}/sharded")
    if rank() == 0:
        bare = llama().double()
        load(bare, f"{folder}/sharded", other_base=True)
        assert_close(lora_state_dict(bare), trained, 0)


@pytest.mark.parametrize("order", ["inject first", "parallelize first"])
def test_four_processes_in_two_data_parallel_and_two_tensor_parallel_ones(order, tmp_path):
    on_ranks(4, two_by_two, order, str(tmp_path))


# Saving on one rank, and what ZeRO-3 leaves


def save_fails(folder):
    _, model, *_ = nets()
    shard(model)
    with pytest.raises(LoRAInjectError, match="cannot be written to"):
        save(model, f"{folder}/file/adapter")


def test_a_save_that_fails_on_the_first_rank_fails_on_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    on_ranks(2, save_fails, str(tmp_path))


def partition(parameters):
    """What ZeRO-3 does to parameters: their values go elsewhere, and an empty tensor is left."""
    values = {}
    for parameter in parameters:
        values[parameter] = parameter.data
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return values


def test_a_model_that_zero3_has_partitioned_is_adapted_by_its_whole_shapes(tmp_path):
    model = Net()
    wanted = copy.deepcopy(model)
    values = partition(model.parameters())
    inject(model, ["q_proj", "v_proj", "embed"], r=3, seed=1)
    inject(wanted, ["q_proj", "v_proj", "embed"], r=3, seed=1)
    assert_close(lora_state_dict(model), lora_state_dict(wanted), 0)
    assert report(model).frozen == report(wanted).frozen
    save(model, tmp_path)  # before deepspeed takes A and B too
    values |= partition(lora_parameters(model))
    for refused in (lora_state_dict, reset_lora_parameters, lambda m: save(m, tmp_path)):
        with pytest.raises(LoRAInjectError, match="GatheredParameters"):
            refused(model)
    with pytest.raises(LoRAInjectError, match="GatheredParameters"):
        load(model, tmp_path)
    with pytest.raises(LoRAInjectError, match="no rank holds it whole"):
        merge(model)
    for parameter, value in values.items():  # what GatheredParameters does
        parameter.data = value
    assert_close(lora_state_dict(model), lora_state_dict(wanted), 0)
    strip(model)
    strip(wanted)
    assert_close(model.state_dict(), wanted.state_dict(), 0)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("model", "targets", "arguments"),
    [
        (nn.MultiheadAttention(4, 2), nn.MultiheadAttention, {}),
        (nn.LSTM(4, 4), nn.LSTM, {}),
        (Table(), "table", {}),
        (nn.Sequential(nn.Linear(4, 4)), "0", {"how": "weight"}),
        (nn.Sequential(nn.Linear(4, 4)), "0", {"bias": "lora_only"}),
    ],
    ids=["attention", "lstm", "parameter", "weight", "bias"],
)
def test_what_zero3_has_partitioned_and_must_be_whole_is_refused(model, targets, arguments):
    partition(model.parameters())
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedLayerError, match="ZeRO-3"):
        inject(model, targets, r=2, **arguments)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_what_starts_from_a_weight_that_zero3_has_partitioned_asks_for_it(method):
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, "0", r=2, seed=1, **method)
    wanted = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    randomize_adapters(model)
    base = [model[0].weight, model[0].bias]
    values = partition(base)
    with pytest.raises(LoRAInjectError, match=r"^0: .*its weight.*GatheredParameters\(\[\*model"):
        reset_lora_parameters(model)
    for parameter, value in values.items():
        parameter.data = value
    reset_lora_parameters(model)
    assert_close(lora_state_dict(model), wanted, 0)


def test_zero3_and_the_conv1d_of_gpt2():
    model, wanted = gpt2(), gpt2()
    partition(model.parameters())
    inject(model, ["c_attn"], r=2, seed=1)
    inject(wanted, ["c_attn"], r=2, seed=1)
    assert_close(lora_state_dict(model), lora_state_dict(wanted), 0)


# The real model


def test_torchrun_trains_minilm_with_fsdp2_to_the_loss_of_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.fsdp", "--steps=3"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "apart in 3 steps" in done.stdout
