"""Variants and starts in files: what we write PEFT computes, and what PEFT writes we compute."""

import copy
import json

import peft
import pytest
import torch
from helpers import Net, ids
from safetensors.torch import load_file
from stored_models import SAFE, Tied, peft_loads
from torch import nn

from lora_inject import (
    FormatError,
    combine,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    save,
    strip,
    use,
)
from lora_inject.core.state import adapters_of


class Several(nn.Module):
    """One layer of each kind that PEFT has a DoRA for."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(9, 6), nn.Linear(6, 8)
        self.old, self.conv = nn.Linear(8, 4), nn.Conv1d(4, 5, 3, padding=1)

    def forward(self, tokens):
        x = self.old(torch.tanh(self.lin(self.emb(tokens))))
        return self.conv(x.mT)


TOKENS = torch.tensor([[1, 4, 8, 2], [0, 3, 3, 7]])
LAYERS = ["emb", "lin", "old", "conv"]


def trained(model, inputs, **arguments):
    torch.manual_seed(1)
    inject(model, LAYERS, r=2, alpha=3, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def several(dtype=torch.float32):
    torch.manual_seed(0)
    return Several().to(dtype).eval()


@pytest.mark.parametrize(
    "method",
    [{"variant": "dora"}, {"variant": "dora", "scaling": "rslora"}, {"init": "pissa"},
     {"init": "olora", "scaling": "rslora"}, {"init": "milora"}, {"init": "gaussian"},
     {"init": "mica"}, {"variant": "dora", "init": "pissa"}],
)  # fmt: skip
def test_peft_computes_what_we_save_and_it_comes_back(method, tmp_path):
    base, model = several(), trained(several(), TOKENS, **method)
    save(model, tmp_path / "a")
    output = model(TOKENS)
    theirs = peft_loads(base, tmp_path / "a")(TOKENS)
    torch.testing.assert_close(theirs, output, rtol=1e-4, atol=1e-5)
    again = several()
    load(again, tmp_path / "a")
    assert torch.equal(again(TOKENS), output)
    twin, first = adapters_of(again.lin)[0], adapters_of(model.lin)[0]
    assert twin.parameters == first.parameters
    assert twin.settings.r == 2
    assert twin.settings.scaling == pytest.approx(first.settings.scaling, rel=1e-12)
    load(model, tmp_path / "a")  # into the adapter that is there
    assert torch.equal(model(TOKENS), output)
    strip(again)
    assert torch.equal(again(TOKENS), base(TOKENS))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_dora_directories_load_exactly(rslora, tmp_path):
    base = several()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=LAYERS, use_dora=True, use_rslora=rslora
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "a")
    model = several()
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), rtol=1e-4, atol=1e-5)
    assert adapters_of(model.lin)[0].settings.variant.name == "dora"
    strip(model)
    assert torch.equal(model(TOKENS), base(TOKENS))


def test_a_start_is_plain_lora_to_others_and_marked_for_us(tmp_path):
    model = trained(several(), TOKENS, init="pissa")
    save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 6, True)
    tensors = load_file(tmp_path / "a" / SAFE)
    A = tensors["base_model.model.lin.lora_A.weight"]
    assert torch.equal(A, torch.cat([model.lin.lora_A, model.lin.lora_A0]))
    again = several()
    load(again, tmp_path / "a")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    save(model, tmp_path / "a.pt", format="loralib")
    plain = several()
    load(plain, tmp_path / "a.pt", alpha=3.0)  # its own, whatever the rank in the file
    assert adapters_of(plain.lin)[0].settings.r == 4
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_state_dicts_have_every_tensor_and_fill_it_again():
    model = trained(several(), TOKENS, variant="dora", init="olora")
    state = {key: tensor.clone() for key, tensor in lora_state_dict(model).items()}
    assert {key for key in state if key.startswith("lin.")} == {
        f"lin.lora_{role}" for role in ("A", "B", "A0", "B0", "magnitude")
    }
    other = trained(several(), TOKENS, variant="dora", init="pissa", seed=5)
    load_lora_state_dict(other, state)
    assert torch.equal(other(TOKENS), model(TOKENS))
    missing = {key: tensor for key, tensor in state.items() if "magnitude" not in key}
    with pytest.raises(FormatError, match=r"missing.*lora_magnitude"):
        load_lora_state_dict(other, missing)


def test_what_other_formats_have_no_word_for_is_refused(tmp_path):
    model = trained(several(), TOKENS, variant="dora")
    with pytest.raises(FormatError, match=r"dora.*loralib's format has no magnitude.*\"peft\""):
        save(model, tmp_path / "a.pt", format="loralib")
    mixed = several()
    inject(mixed, {"lin": {"variant": "dora"}, "old": {}}, r=2)
    with pytest.raises(FormatError, match=r"one variant for all layers.*dora.*lora"):
        save(mixed, tmp_path / "a")
    grouped = nn.ModuleDict({"c": nn.Conv1d(4, 4, 1, groups=2)})
    inject(grouped, "c", r=1, variant="dora")
    with pytest.raises(FormatError, match=r"c is grouped where PEFT's dora is not the same"):
        save(grouped, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_file_that_lacks_magnitudes_or_has_too_many_is_refused(tmp_path):
    save(trained(several(), TOKENS, variant="dora"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(FormatError, match=r"magnitude.*asks for nothing"):
        load(several(), tmp_path / "a")
    save(trained(several(), TOKENS), tmp_path / "b")
    file = tmp_path / "b" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(FormatError, match=r"nothing besides A and B.*asks for \['magnitude'\]"):
        load(several(), tmp_path / "b")


def test_tied_layers_share_a_start_and_refuse_rows_that_are_columns(tmp_path):
    tokens, model = torch.tensor([[1, 2]]), Tied()
    expected = model(tokens)
    inject(model, "emb", r=2, init="pissa")
    assert torch.equal(model(tokens), expected)
    with torch.no_grad():
        model.emb.lora_A.mul_(1.5)
    save(model, tmp_path / "a.pt", format="loralib")
    state = {key: tensor.clone() for key, tensor in lora_state_dict(model).items()}
    load_lora_state_dict(model, state)
    changed = model(tokens)
    assert not torch.equal(changed, expected)
    strip(model)
    assert torch.equal(model(tokens), expected)
    with pytest.raises(ValueError, match=r"emb: its weight is tied to weight of head.*columns"):
        inject(model, "emb", r=2, variant="dora")


def test_parts_with_a_start_come_back(tmp_path):
    model = Net()
    inject(model, "q_proj", r=2, init="pissa", parts={"q_proj": ("a", None)})
    with torch.no_grad():
        model.layers[0].q_proj.a_lora_A.mul_(1.5)
    save(model, tmp_path / "a")
    again = Net()
    again.load_state_dict(strip(copy.deepcopy(model)).state_dict())
    load(again, tmp_path / "a")
    x = ids()
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(again.layers[0].q_proj.a_lora_A0, model.layers[0].q_proj.a_lora_A0)


class Wide(nn.Module):
    """Layers whose change has more directions than a small rank."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv = nn.Linear(24, 20), nn.Conv1d(20, 16, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.tanh(self.lin(x)).mT)


def wide(**arguments):
    torch.manual_seed(0)
    model = Wide()
    if arguments:
        inject(model, ["lin", "conv"], alpha=3, **arguments)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                if parameter.requires_grad:
                    parameter.add_(noise * (0.1 if "magnitude" in name else 1))
    return model


@pytest.mark.parametrize("method", [{"variant": "dora"}, {"variant": "dora", "init": "pissa"}])
def test_portable_files_of_any_variant_are_as_near_as_their_rank_allows(method, tmp_path):
    model, x = wide(r=4, **method), torch.randn(2, 7, 24)
    with pytest.raises(FormatError, match=r"lin is a dora.*r=16, error="):
        save(model, tmp_path / "a", portable=True)
    with pytest.raises(FormatError, match=r"2 of 2 weights would lose more than 1.00%.*larger r"):
        save(model, tmp_path / "a", portable=True, r=6, error=0.01)
    assert not list(tmp_path.iterdir())
    report = save(model, tmp_path / "a", portable=True, r=6, error=0.9)
    assert 0.01 < report.worst < 0.9
    assert [row.r for row in report.weights] == [6, 6]
    whole = save(model, tmp_path / "b", portable=True, r=24)
    assert whole.worst < 1e-5
    theirs = peft_loads(wide(), tmp_path / "b")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    near = peft_loads(wide(), tmp_path / "a")
    assert 1e-3 < (near(x) - model(x)).abs().max() < 0.5
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["use_dora"] is False
    assert "lost" in str(report)


def test_a_portable_file_of_a_smaller_rank_is_the_best_of_that_rank(tmp_path):
    model = wide(r=6)
    report = save(model, tmp_path / "a", portable=True, r=3, error=1.0)
    A, B = model.lin.lora_A.double(), model.lin.lora_B.double()
    values = torch.linalg.svdvals(B @ A)
    best = values[3:].norm() / values.norm()
    assert report.weights[0].lost == pytest.approx(best.item(), rel=1e-3)
    with pytest.raises(ValueError, match="r and error are for portable=True"):
        save(model, tmp_path / "b", r=3)


def test_combining_dora_needs_a_rank_and_says_what_it_loses():
    model, x = wide(r=4, variant="dora", adapter="one"), torch.randn(2, 7, 24)
    use(model, {"one": 0.5})
    half = model(x)
    with pytest.raises(ValueError, match=r"lin: 'one' is a dora.*how=\"svd\" with r="):
        combine(model, {"one": 0.5}, "two", how="svd")
    assert combine(model, {"one": 0.5}, "two", how="svd", r=24).worst < 1e-5
    use(model, "two")
    torch.testing.assert_close(model(x), half, rtol=1e-4, atol=1e-4)
    assert combine(model, {"one": 1.0}, "three", how="svd", r=2).worst > 0.05


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_directories_whose_base_peft_has_moved_load_over_the_base_as_it_is(start, rslora, tmp_path):
    base, x = wide(), torch.randn(2, 7, 24)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["lin"], init_lora_weights=start, use_rslora=rslora,
        modules_to_save=["conv"],
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "a")
    model = wide()
    load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    output = model(x)
    save(model, tmp_path / "b")  # from here on nothing has to be made again
    again = wide()
    load(again, tmp_path / "b")
    assert torch.equal(again(x), output)
    strip(model)
    assert torch.equal(model(x), base(x))
    with pytest.raises(FormatError, match=r"for lin that cannot be made again.*float32"):
        load(wide().bfloat16(), tmp_path / "a", other_base=True)
    file = tmp_path / "a" / "adapter_config.json"
    said = {**json.loads(file.read_text()), "init_lora_weights": f"{start}_niter_4"}
    file.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"_niter_4' moves the weights of the base"):
        load(wide(), tmp_path / "a")


def test_a_dora_of_weights_that_peft_has_moved_is_refused_for_what_it_is(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["lin"], init_lora_weights="pissa", use_dora=True
    )  # fmt: skip
    peft.get_peft_model(wide(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match=r"dora of lin is of the moved ones.*extract\(base"):
        load(wide(), tmp_path / "a")


def test_parts_with_a_magnitude_are_refused_with_a_way_that_there_is(tmp_path):
    model = nn.Sequential(nn.Linear(8, 12))
    inject(model, "0", r=2, variant="dora", parts={"0": ("q", None, "v")})
    with pytest.raises(FormatError, match=r"\(q\) is a dora.*portable=True, r=16, error=0.1"):
        save(model, tmp_path / "a")
    save(model, tmp_path / "b", portable=True, r=16, error=0.1)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("init", ["default", "olora"])
def test_loralib_files_mean_the_same_with_the_alpha_of_the_adapter(scaling, init, tmp_path):
    model, x = wide(), torch.randn(2, 7, 24)
    inject(model, "lin", r=4, alpha=6, scaling=scaling, init=init)
    with torch.no_grad():
        model.lin.lora_B.add_(torch.randn_like(model.lin.lora_B))
    save(model, tmp_path / "a.pt", format="loralib")
    again = wide()
    load(again, tmp_path / "a.pt", alpha=6)
    torch.testing.assert_close(again(x), model(x))


def test_what_is_loaded_acts_as_those_that_stand_there(tmp_path):
    model = trained(several(), TOKENS, variant="loha", adapter="loha")
    save(model, tmp_path / "plain", portable=True)
    load(model, tmp_path / "plain", adapter="plain")
    inject(model, LAYERS, r=2, adapter="fresh")
    ways = {layer: {a.way for a in adapters_of(getattr(model, layer))} for layer in LAYERS}
    assert list(ways.values()) == [{"weight"}] * len(LAYERS)
    use(model, "loha")
    expected = model(TOKENS)
    use(model, "plain")
    torch.testing.assert_close(model(TOKENS), expected)


@pytest.mark.parametrize("r", [None, 1])
def test_a_portable_file_is_of_no_fixed_factor(r, tmp_path):
    model = trained(several(), TOKENS, init="mica")
    save(model, tmp_path / "a", portable=True, r=r, error=1.0)
    again = several()
    load(again, tmp_path / "a")
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)


def test_a_file_of_the_orthogonal_start_is_plain_lora(tmp_path):
    base, x = wide(), torch.randn(2, 7, 24)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["lin"], init_lora_weights="orthogonal"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = load(wide(), tmp_path)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert adapters_of(model.lin)[0].settings.variant.text == ""
    assert torch.equal(strip(model)(x), base(x))
