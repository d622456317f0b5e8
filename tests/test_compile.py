"""torch.compile, torch.export and ONNX: one graph, the eager values, and changes are noticed."""

import shutil

import pytest
import torch
from families import FAMILIES, llama, mixtral, unet
from helpers import HOOKS_OUTSIDE, Block, Net, checkpoint_blocks, ids, randomize_adapters
from torch import nn

from lora_inject import LoRAInjectError, disabled, inject, merge, merged, strip, unmerge, use

pytestmark = [
    pytest.mark.usefixtures("device"),
    # Of inductor's imports, and of dynamo's look at the inputs of a block.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    # A test that makes more than torch's usual 8 changes to one model says nothing about that.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


def adapted(model, targets, **settings):
    inject(model, targets, r=2, **settings)
    randomize_adapters(model)
    return model


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gradients(model, run):
    loss = run().pow(2).sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_of_the_whole_model_with_the_values_and_gradients_of_eager(dynamic):
    model = adapted(Net().double(), ["q_proj", "v_proj", "embed"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for columns in (5, 7) if dynamic else (5,):
        x = ids(2, columns)
        close(compiled(x), model(x), 1e-12)
        eager = gradients(model, lambda x=x: model(x))
        close(gradients(model, lambda x=x: compiled(x)), eager, 1e-12)


def test_dynamic_shapes_are_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = adapted(Net().eval(), ["q_proj", "v_proj"])
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for columns in (4, 5, 9):
        compiled(ids(3, columns))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mixtral"])
def test_real_families_in_one_graph(name):
    family, targets = FAMILIES[name], list(FAMILIES[name].targets)
    # The loop over experts that mixtral has by default compiles without adapters no more.
    model = (mixtral("batched_mm") if name == "mixtral" else family.build()).double().eval()
    targets += ["experts.gate_up_proj", "experts.down_proj"] if name == "mixtral" else []
    adapted(model, targets)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in family.inputs().items()}
    inputs |= {"use_cache": False} if "input_ids" in inputs else {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(**inputs)[0], model(**inputs)[0], 1e-12)
    eager = gradients(model, lambda: model(**inputs)[0])
    close(gradients(model, lambda: compiled(**inputs)[0]), eager, 1e-10)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_with_gradients():
    model = adapted(Block(8).double(), ["q_proj", "v_proj"])
    x = torch.randn(2, 5, 8, dtype=torch.double)
    compiled = torch.compile(model, fullgraph=True)
    eager = gradients(model, lambda: model(x))
    close(gradients(model, lambda: compiled(x)), eager, 1e-9)


@pytest.mark.parametrize("before", [True, False], ids=["compile-inject", "inject-compile"])
def test_blocks_that_are_compiled_one_by_one(before):
    model = Net().double()
    if not before:
        adapted(model, ["q_proj", "v_proj"])
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    if before:
        model(ids())
        adapted(model, ["q_proj", "v_proj"])
    x, twin = ids(), Net().double()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    base = twin(x)
    adapted(twin, ["q_proj", "v_proj"])
    twin.load_state_dict(model.state_dict())
    close(model(x), twin(x), 1e-12)
    strip(model)
    close(model(x), base, 1e-12)


def wrapped(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model):
    model.compile(backend="eager", fullgraph=True)
    return model


def forward_alone(model):
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize(
    ("compiled_by", "targets", "how"),
    [
        (wrapped, ["q_proj", "v_proj"], "auto"),
        (in_place, ["q_proj", "v_proj"], "auto"),
        (forward_alone, ["embed", "o_proj"], "auto"),
        (wrapped, ["q_proj", "embed"], "weight"),
    ],
)
def test_a_compiled_model_notices_whatever_is_done_to_its_adapters(compiled_by, targets, how):
    torch.manual_seed(3)
    model, reference, x = Net().double(), Net().double(), ids()
    reference.load_state_dict(model.state_dict())
    compiled = compiled_by(model)

    def agree():
        output = compiled(x)
        close(output, reference(x), 1e-12)  # in eager mode a layer sums in another order
        return output

    base = agree()
    for m in (model, reference):
        inject(m, targets, r=2, how=how, seed=1)
    agree()
    randomize_adapters(reference)
    values = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    assert (agree() - base).abs().max() > 1e-3
    with disabled(model), disabled(reference):
        assert torch.equal(agree(), base)
    with merged(model), merged(reference):
        agree()
    for m in (model, reference):
        merge(m)
    agree()
    for m in (model, reference):
        unmerge(m)
        use(m)
    assert torch.equal(agree(), base)
    for m in (model, reference):
        use(m, {"default": 0.5})
    agree()
    for m in (model, reference):
        strip(m)
    assert torch.equal(agree(), base)
    for m in (model, reference):
        inject(m, ["o_proj"], r=3, seed=2, bias="lora_only")
    with torch.no_grad():
        for m in (model, reference):
            for layer in m.layers:
                layer.o_proj.lora_B.fill_(0.1)
                layer.o_proj.bias.fill_(0.2)
    assert (agree() - base).abs().max() > 1e-3
    strip(compiled), strip(reference)
    assert torch.equal(agree(), base)


def test_a_layer_that_is_compiled_by_itself():
    model, x = Net().double(), ids()
    base = model(x)
    layer = model.layers[0].q_proj
    layer.compile(backend="eager")
    adapted(model, ["q_proj"])
    plain = Net().double()
    inject(plain, ["q_proj"], r=2)
    plain.load_state_dict(model.state_dict())
    close(model(x), plain(x), 1e-12)
    with disabled(model):
        assert torch.equal(model(x), base)
    layer.forward = torch.compile(layer.forward, backend="eager")
    close(model(x), plain(x), 1e-12)
    with pytest.raises(LoRAInjectError, match=r"layers.0.q_proj: a forward was set on this very"):
        strip(model)
    close(model(x), plain(x), 1e-12)
    del layer.forward
    strip(model)
    assert torch.equal(model(x), base)


def test_training_a_model_that_was_compiled_before_it_was_adapted():
    model, x = Net().double(), ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    compiled(x).sum().backward()
    adapted(model, ["q_proj"])
    assert all(p.grad is None for p in model.parameters())
    eager = gradients(model, lambda: model(x))
    assert len(eager) == 4
    close(gradients(model, lambda: compiled(x)), eager, 1e-12)


def test_dropout_compiles():
    model = adapted(Net(), ["q_proj"], dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = ids()
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    close(compiled(x), model(x), 1e-6)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=HOOKS_OUTSIDE), False])
def test_checkpointed_blocks_compile(reentrant):
    model = adapted(llama().double().train(), ["q_proj", "v_proj"])
    inputs = {"input_ids": ids(), "use_cache": False}
    eager = gradients(model, lambda: model(**inputs)[0])
    checkpoint_blocks(model, reentrant)
    model.disable_input_require_grads()  # transformers' own hook; ours is enough
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    close(gradients(model, lambda: model(**inputs)[0]), eager, 1e-10)


def test_export():
    model, x = adapted(Net().double().eval(), ["q_proj", "v_proj", "embed"]), ids()
    columns = torch.export.Dim("columns", min=2, max=32)
    for strict in (True, False):
        program = torch.export.export(model, (x,), dynamic_shapes=({1: columns},), strict=strict)
        for size in (5, 9):
            x = ids(2, size)
            close(program.module()(x), model(x), 1e-12)
        assert "layers.0.q_proj.lora_A" in program.state_dict


def test_export_of_a_convolution_net_and_of_attention():
    model = adapted(unet().double(), ["to_q", "conv1"])
    args = (
        torch.randn(1, 4, 8, 8, dtype=torch.double), torch.tensor(3),
        torch.randn(1, 3, 8, dtype=torch.double),
    )  # fmt: skip
    program = torch.export.export(model, args)
    close(program.module()(*args)[0], model(*args)[0], 1e-12)
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double(), ["self_attn"])
    x = torch.randn(2, 5, 8, dtype=torch.double)
    layer.eval()
    close(torch.export.export(layer, (x,)).module()(x), layer(x), 1e-12)


@pytest.mark.cpu("what runs the file does")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec..:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_onnx_of_a_merged_model(name):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")

    model, inputs = FAMILIES[name].build().eval(), FAMILIES[name].inputs()
    flags = {"use_cache": False} if "input_ids" in inputs else {}
    base = model(**inputs, **flags)[0]
    adapted(model, ["q_proj", "v_proj"])
    merge(model)
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs={**inputs, **flags}, verbose=False)
        expected = model(**inputs, **flags)[0]
    assert not [value for value in program.model.graph.initializers if "lora" in value]
    onnx = reference.ReferenceEvaluator(program.model_proto)
    (got, *_) = onnx.run(None, {key: value.numpy() for key, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-6)
    assert (expected - base).abs().max() > 1e-3
