"""What of a file is the adapter's, and what are values of the base that come along with it."""

import copy
import json

import pytest
import torch
import transformers as tf
from families import DECODER
from helpers import changed_parts, snapshot
from safetensors.torch import save_file
from stored_models import Tied
from torch import nn

from lora_inject import FormatError, inject, load, lora_parameters, save, strip, use

pytestmark = pytest.mark.cpu("files are read on it")

P = "base_model.model."


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.q = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return self.q(self.emb(tokens))


def tokens():
    torch.manual_seed(0)
    return Tokens()


def peft(folder, path, A, B, others, **config):
    """A PEFT directory with one pair and other tensors."""
    name = "lora_embedding_{}" if "emb" in path else "lora_{}.weight"
    tensors = {f"{P}{path}.{name.format(x)}": t for x, t in (("A", A), ("B", B))}
    folder.mkdir(exist_ok=True)
    save_file(tensors | {P + k: v for k, v in others.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [path], **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def with_embedding(folder, value, **config):
    others = {"emb.weight": torch.full((9, 4), value)}
    return peft(folder, "q", torch.ones(2, 4), torch.ones(4, 2), others, **config)


def test_values_of_the_base_come_along_and_do_not_train(tmp_path):
    model = tokens()
    former = snapshot(model)
    file = with_embedding(tmp_path / "a", 0.5)
    load(model, file)
    assert torch.equal(model.emb.weight, torch.full((9, 4), 0.5))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["q.lora_A", "q.lora_B"]
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    assert torch.equal(model.emb.weight, torch.full((9, 4), 0.5))
    save(model, tmp_path / "again")
    again = load(tokens(), tmp_path / "again")
    assert torch.equal(again(torch.arange(9)), model(torch.arange(9)))
    assert not again.emb.weight.requires_grad
    load(model, file)  # fills what it filled before
    assert torch.equal(model.q.lora_A, torch.ones(2, 4))
    strip(model)
    assert changed_parts(former, snapshot(model)) == []


@pytest.mark.parametrize(("saved", "loaded"), [(torch.bfloat16, torch.float32),
                                               (torch.float32, torch.bfloat16)])  # fmt: skip
def test_the_base_in_other_bits_is_the_base(saved, loaded, tmp_path):
    model = tokens().to(loaded)
    former = model.emb.weight.detach().clone()
    base = {"emb.base_layer.weight": tokens().emb.weight.detach().to(saved)}
    load(model, peft(tmp_path, "emb", torch.ones(2, 9), torch.ones(4, 2), base))
    assert torch.equal(model.emb.weight, former)
    other = {"emb.base_layer.weight": base["emb.base_layer.weight"] * 2}
    with pytest.raises(FormatError, match="weight of the adapted layer emb"):
        load(tokens(), peft(tmp_path, "emb", torch.ones(2, 9), torch.ones(4, 2), other))


def test_they_train_where_modules_to_save_names_them(tmp_path):
    model = load(tokens(), with_embedding(tmp_path / "a", 0.5, modules_to_save=["emb"]))
    assert model.emb.weight.requires_grad


def test_each_adapter_has_the_values_that_came_with_it(tmp_path):
    model = tokens()
    former = model.emb.weight.detach().clone()
    load(model, with_embedding(tmp_path / "a", 0.5), adapter="a")
    load(model, with_embedding(tmp_path / "b", 0.5), adapter="b")
    for names, value in ((["b"], torch.full((9, 4), 0.5)), ([], former)):
        use(model, *names)
        assert torch.equal(model.emb.weight, value)


@pytest.mark.parametrize("place", ["emb", "head"])
def test_values_for_one_place_of_a_tied_weight(place, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": Tied(), "q": nn.Linear(4, 4)})
    former, others = snapshot(model), {f"net.{place}.weight": torch.full((9, 4), 0.5)}
    pair = "q", torch.ones(2, 4), torch.ones(4, 2), others
    with pytest.raises(FormatError, match=rf"net\.emb\.weight is tied in this model to "
                       rf"net\.head\.weight, and .* for net\.{place}\.weight\. Untie"):  # fmt: skip
        load(model, peft(tmp_path, *pair, modules_to_save=[f"net.{place}"]))
    assert changed_parts(former, snapshot(model)) == []
    load(model, peft(tmp_path, *pair))
    assert model["net"].emb.weight is model["net"].head.weight
    assert torch.equal(model["net"].head.weight, torch.full((9, 4), 0.5))
    save(model, tmp_path / "again")
    strip(model)
    assert changed_parts(former, snapshot(model)) == []


def test_different_values_for_the_places_of_a_tied_weight(tmp_path):
    model = nn.ModuleDict({"net": Tied(), "q": nn.Linear(4, 4)})
    others = {f"net.{n}.weight": torch.full((9, 4), x) for n, x in (("emb", 0.5), ("head", 0.25))}
    with pytest.raises(FormatError, match=r"net\.emb\.weight and net\.head\.weight, which differ"):
        load(model, peft(tmp_path, "q", torch.ones(2, 4), torch.ones(4, 2), others))


ROWS = {
    "a tensor": ("model.layers.0.self_attn.q_proj", (2, 16), (16, 2), "model.embed_tokens"),
    "a head": ("model.layers.0.self_attn.q_proj", (2, 16), (16, 2), "lm_head"),
    "an adapted embedding": ("model.embed_tokens", (2, 70), (16, 2), ""),
    "an adapted head": ("lm_head", (2, 16), (70, 2), ""),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("filled", [False, True])
def test_more_tokens_than_the_model_has_rows_for(case, filled, tmp_path):
    path, A, B, other = ROWS[case]
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**{**DECODER, "tie_word_embeddings": False}))
    rows, width = base.get_input_embeddings().weight.shape
    assert (rows, width) == (64, 16)
    others = {f"{other}.weight": torch.zeros(70, 16)} if other else {}
    peft(tmp_path, path, torch.ones(A), torch.ones(B), others)
    model = copy.deepcopy(base)
    if filled:
        own = [(64 if n == 70 else n for n in shape) for shape in (A, B)]
        old = {name: tensor[:64] for name, tensor in others.items()}
        load(model, peft(tmp_path / "old", path, *(torch.ones(*s) for s in own), old,
                         modules_to_save=[other] if other else None))  # fmt: skip
    before = snapshot(model)
    with pytest.raises(FormatError, match=rf"{other or path}: it has 64 rows.* the file has 70\. "
                       r"Call model\.resize_token_embeddings\(70\) first"):  # fmt: skip
        load(model, tmp_path)
    assert changed_parts(before, snapshot(model)) == []
    base.resize_token_embeddings(70, mean_resizing=False)
    load(base, tmp_path)


def shared_norm():
    norm = nn.BatchNorm1d(4)
    body = nn.ModuleDict({"first": nn.Sequential(norm), "q": nn.Linear(4, 4)})
    return nn.ModuleDict({"body": body, "head": nn.Sequential(nn.Linear(4, 4), norm)})


@pytest.mark.parametrize("trains", [False, True])
def test_what_trains_in_full_and_is_shared_with_another_part(trains, tmp_path):
    """Its first path is not below what was named; as it began it is no repetition of the base."""
    model = shared_norm()
    base = copy.deepcopy(model)
    inject(model, "q", r=2, train_also="head")
    if trains:
        with torch.no_grad():
            for tensor in model["head"].state_dict().values():
                tensor.add_(1)
    save(model, tmp_path)
    load(base, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(base.state_dict()[key], value), key
