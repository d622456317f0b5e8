"""An audit of sound models is clean, leaves everything as it was, and says what it found."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, llama, unet
from helpers import changed_parts, checkpoint_blocks, randomize_adapters, snapshot, train_steps
from ranks import on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import lora_inject
from lora_inject import (
    ArgumentError,
    Finding,
    LoRAInjectError,
    audit,
    disabled,
    inject,
    lora_parameters,
    merge,
    monitor,
    param_groups,
    per_row,
    strip,
    use,
)
from lora_inject.audit.codes import page

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(params=[*FAMILIES, "unet"])
def family(request):
    """A model, a batch and targets."""
    if request.param == "unet":
        sample = torch.randn(2, 4, 8, 8)
        batch = (sample, torch.tensor([1, 5]), torch.randn(2, 3, 8))
        return unet().train(), batch, ["to_q", "to_v", "conv1"]
    found = FAMILIES[request.param]
    return found.build(), found.inputs(), list(found.targets)


SETTINGS = [{}, {"bias": "lora_only", "dropout": 0.1}, {"variant": "dora"}, {"init": "pissa"},
            {"variant": "loha"}, {"how": "weight"}]  # fmt: skip


def steps(model, batch, optimizer, number=3):
    for _ in range(number):
        output = model(*batch) if isinstance(batch, tuple) else model(**batch)
        target = torch.linspace(-1, 1, output[0].numel()).reshape(output[0].shape)
        (output[0] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_family_is_clean_right_after_inject_and_after_training(family, settings):
    model, batch, targets = family
    inject(model, targets, r=2, **settings)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, weight_decay=0.01))
    for _ in range(2):
        before, numbers = snapshot(model), torch.get_rng_state()
        found = audit(model, batch, optimizer=optimizer)
        assert found.clean, found
        assert changed_parts(before, snapshot(model)) == []
        assert torch.equal(numbers, torch.get_rng_state())
        assert audit(model, optimizer=optimizer).clean
        steps(model, batch, optimizer)


def test_everything_adapted_is_clean_too():
    for name in ("llama", "gpt2", "t5", "vit"):
        model, batch = FAMILIES[name].build(), FAMILIES[name].inputs()
        inject(model, "all-linear", r=2)
        assert audit(model, batch).clean, name


@pytest.mark.parametrize("make", [lambda: nn.LSTM(6, 5), lambda: nn.MultiheadAttention(8, 2)])
def test_layers_that_are_adapted_in_their_weight(make):
    model = make()
    inject(model, nn.Module, r=2)
    batch = torch.randn(4, 3, 6) if isinstance(model, nn.LSTM) else (torch.randn(4, 3, 8),) * 3
    assert audit(model, batch).clean


# --- what is as it was --------------------------------------------------------------------------


def test_gradients_that_are_there_and_all_random_numbers_stay():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2, dropout=0.5)
    model(**batch).logits.square().mean().backward()
    own = [p.grad for p in lora_parameters(model)]
    values = [g.clone() for g in own]
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    audit(model, batch)
    assert all(p.grad is g for p, g in zip(lora_parameters(model), own, strict=True))
    assert all(map(torch.equal, own, values))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers


class Keeps(nn.Module):
    """A model that keeps much of what it saw, and draws from every generator."""

    def __init__(self):
        super().__init__()
        self.inner = llama()
        self.norm = nn.BatchNorm1d(64)
        self.calls, self.last, self.seen = [], None, {}
        self.register_buffer("average", torch.zeros(()))

    def forward(self, input_ids):
        logits = self.inner(input_ids).logits
        self.calls.append(random.random() + np.random.rand())
        self.last, self.seen["logits"] = logits, logits
        self.new = 1
        self.average = self.average + 1
        self.norm.train()
        input_ids.zero_()
        return self.norm(logits.transpose(1, 2))


def test_what_a_model_keeps_of_a_run_is_not_there_afterwards():
    model, ids = Keeps(), torch.randint(60, (2, 7))
    inject(model, ["q_proj"], r=2, train_also=["norm"])
    model.norm.eval()
    before, batch, numbers = snapshot(model), ids.clone(), np.random.get_state()[1].tolist()
    audit(model, ids)
    assert changed_parts(before, snapshot(model)) == []
    assert (model.calls, model.seen, model.last) == ([], {}, None)
    assert torch.equal(ids, batch)
    assert np.random.get_state()[1].tolist() == numbers


def test_an_error_in_the_model_leaves_it_as_it_was():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        audit(model, batch)
    assert changed_parts(before, snapshot(model)) == []


def test_an_optimizer_in_the_backward_pass_takes_no_step():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    steps = []
    for parameter in lora_parameters(model):
        parameter.register_post_accumulate_grad_hook(steps.append)
    audit(model, batch)
    assert steps == []
    model(**batch).logits.mean().backward()
    assert len(steps) == len(lora_parameters(model))


def test_training_goes_on_as_without_an_audit():
    def losses(audits):
        torch.manual_seed(0)
        model, batch = llama(), FAMILIES["llama"].inputs()
        inject(model, ["q_proj"], r=2, seed=0, dropout=0.2)
        found = []
        for _ in range(3):
            if audits:
                audit(model, batch)
            found.append(train_steps(model, batch, steps=1))
        return found

    assert losses(True) == losses(False)


def test_reentrant_and_other_checkpointing_is_no_fault():
    for reentrant in (True, False):
        model, batch = llama(), FAMILIES["llama"].inputs()
        inject(model, ["q_proj", "v_proj"], r=2)
        checkpoint_blocks(model, reentrant)
        assert audit(model, {**batch, "use_cache": False}).clean
        strip(model)


def test_blocks_and_rows_are_no_fault():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    inject(model, ["q_proj"], r=2, adapter="b")
    randomize_adapters(model, 0.01)
    use(model, "default", "b")
    with per_row(model, ["default", "b"]):
        assert audit(model, batch).clean
    with disabled(model):
        assert set(audit(model, batch).codes) == {"asleep", "loss-detached"}


def test_an_adapter_that_does_not_train_is_audited_for_what_it_does():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    inject(model, ["v_proj"], r=2, adapter="b")
    randomize_adapters(model, 0.01)
    use(model, "default", "b", train=["b"])
    assert audit(model, batch).clean


def on_a_rank():
    """What audits of a model in shards, and of one that is reduced, find; and a monitor."""
    torch.manual_seed(0)
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj", "up_proj"], r=2)
    wrapper = nn.parallel.DistributedDataParallel(model)
    found = [audit(wrapper, batch), audit(model, batch)]
    wrapper(**batch).logits.square().mean().backward()
    found.append(audit(wrapper, batch))
    model = llama()
    inject(model, ["q_proj", "up_proj"], r=2)
    for block in (*model.model.layers, model):
        fully_shard(block)
    found.append(audit(model, batch))
    optimizer, watch = torch.optim.Adam(lora_parameters(model), 1e-3), monitor(model, steps=2)
    for _ in range(2):
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    return [each.codes for each in (*found, audit(model, batch, optimizer=optimizer), watch.result)]


@pytest.mark.distributed
@pytest.mark.cpu("processes with gloo")
def test_wrappers_of_several_ranks_are_no_fault():
    assert on_ranks(2, on_a_rank) == [[()] * 6] * 2


def test_compiled_models_are_no_fault():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj", "up_proj"], r=2)
    compiled = torch.compile(model, backend="eager")
    for each in (compiled, model):
        compiled(**batch)
        assert audit(each, batch).clean


def test_rows_of_a_table_that_a_batch_has_not_are_no_fault():
    model, batch = llama(), {"input_ids": torch.arange(10)[None]}
    inject(model, ["q_proj"], r=2, rows={"embed_tokens": [50, 60]})
    randomize_adapters(model, 0.01)
    assert audit(model, batch).clean


def test_what_was_left_alone_and_adapted_since_is_not_named():
    model = FAMILIES["mixtral"].build()
    whole = nn.ModuleDict({"model": model})
    inject(model, "all-linear", r=2)
    paths = [found.path for found in audit(whole).findings]
    assert "model.model.layers.0.mlp.experts.down_proj" in paths
    inject(model, ["experts.down_proj"], r=2)
    assert not any("down_proj" in found.path for found in audit(whole).findings)


# --- batches and losses -------------------------------------------------------------------------


def test_batches_of_any_form_and_a_loss_of_ones_own():
    model = llama()
    inject(model, ["q_proj"], r=2)
    ids = torch.randint(60, (2, 7))
    seen = []

    def loss(output, batch):
        seen.append(batch)
        return output.logits.square().mean()

    for batch in (ids, (ids,), {"input_ids": ids}, {"input_ids": ids, "labels": ids}):
        assert audit(model, batch).clean
        assert audit(model, batch, loss=loss).clean
    assert len(seen) == 4


def test_what_cannot_be_a_loss_is_refused():
    model, ids = llama(), torch.randint(60, (2, 7))
    inject(model, ["q_proj"], r=2)
    with pytest.raises(ArgumentError, match="loss must return one number"):
        audit(model, ids, loss=lambda output, _: output.logits)
    with pytest.raises(ArgumentError, match="loss is for a batch"):
        audit(model, loss=lambda output, _: output.logits.mean())


# --- what it says -------------------------------------------------------------------------------


def test_it_prints_a_table_the_worst_first_or_one_line():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    found = audit(model, batch)
    assert str(found) == (
        "Audit of LlamaForCausalLM (2 adapted layers), on one batch: nothing found."
    )
    assert found._repr_html_().startswith("<div")
    model.lm_head.requires_grad_(True)
    model.lm_head.weight.grad = None
    model.model.norm.weight.grad = torch.zeros(16)
    found = audit(model, batch)
    assert found.codes == ("thawed", "stale-gradient")
    assert found.findings[0] == Finding("thawed", "lm_head.weight")
    text = str(found)
    assert found.line in text
    assert "1 error, 1 warning" in text
    assert text.index("lm_head.weight") < text.index("model.norm.weight")
    assert "freeze(model) freezes it" in " ".join(text.split())
    assert "thawed" in found._repr_html_()
    assert found.to_dict()["findings"][0]["remedy"] == found.findings[0].remedy


def test_strict_raises_with_the_table_and_notes_alone_pass():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    audit(model, batch, strict=True)
    model.enable_input_require_grads()
    assert audit(model, batch, strict=True).codes == ("graph-early",)
    model.lm_head.requires_grad_(True)
    with pytest.raises(LoRAInjectError, match="thawed") as raised:
        audit(model, batch, strict=True)
    assert raised.value.path == "lm_head.weight"


def test_many_places_of_one_code_are_one_row():
    model = llama()
    inject(model, ["q_proj", "v_proj", "o_proj"], r=2)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(False)
    text = str(audit(model))
    assert "model.layers.{0..1}.self_attn.q_proj.lora_B" in text
    assert text.count("frozen: ") == 1
    assert "and 4 more" in text
    assert repr(audit(model)).startswith("<Audit: ")


def test_the_page_of_codes_is_what_the_codes_say():
    path = Path(lora_inject.__file__).parent / "guide" / "audit_codes.md"
    assert path.read_text(encoding="utf-8") == page()


# --- what it costs ------------------------------------------------------------------------------


def test_an_audit_computes_less_than_two_steps_of_training():
    """By operations counted, which no other process slows down; with all layers adapted."""
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, "all-linear", r=2)

    def counted(action):
        with FlopCounterMode(display=False) as counter:
            action()
        return counter.get_total_flops()

    step = counted(lambda: model(**batch).logits.square().mean().backward())
    assert step < counted(lambda: audit(model, batch)) <= 2 * step


def test_a_copy_of_a_model_is_audited_like_it():
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj"], r=2)
    assert audit(copy.deepcopy(model), batch).clean
    assert audit(llama(), batch).codes == ("no-adapter",)


# --- what a loss is made of ---------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.fc, self.made = nn.Linear(4, 4), made

    def forward(self, x):
        return self.made(self.fc(x))


def test_a_loss_is_made_of_whatever_holds_numbers():
    x = torch.randn(2, 4)
    for made in (torch.mean, lambda y: y.sum().reshape(1), lambda y: {"y": [y]}, lambda y: (y, 3)):
        model = Returns(made)
        inject(model, "fc", r=2)
        assert audit(model, x).clean
    for made in (lambda y: None, lambda y: y.argmax(-1), lambda y: "text"):
        model = Returns(made)
        inject(model, "fc", r=2)
        with pytest.raises(ArgumentError, match=r"returned no tensor\. Give loss="):
            audit(model, x)
        assert audit(model, x, loss=lambda *_, own=model.fc: own(x).square().mean()).clean


def test_a_merged_adapter_that_should_train_sleeps():
    model = Returns(torch.mean)
    inject(model, "fc", r=2)
    merge(model)
    assert [(f.code, f.detail) for f in audit(model).findings] == [("asleep", "merged")]
