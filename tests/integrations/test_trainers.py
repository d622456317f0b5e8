"""transformers' Trainer, accelerate and Lightning train an injected model, save it and resume."""

import json
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import lightning
import pytest
import torch
import transformers as tf
from families import llama
from helpers import CHECKPOINTING, Net, changed_parts, randomize_adapters, raw, snapshot
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lora_inject import (
    FormatError,
    LoRAInjectError,
    LoRAInjectWarning,
    UnsupportedLayerError,
    disabled,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    merge,
    merged,
    save,
    strip,
    use,
)
from lora_inject.core.state import state_of
from lora_inject.core.travelling import ENTRY, as_entry
from lora_inject.integrations.trained import trained_tensors

# Of workers, folders and hardware, and of its own use of torch.
LIGHTNING_WARNS = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning", "ignore:.isinstance.treespec, LeafSpec..:FutureWarning"
)
TARGETS = ["q_proj", "v_proj"]


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(6) * (index + 1)) % 60 + 3
        return {"input_ids": ids, "labels": ids}


def adapted(**settings):
    torch.manual_seed(0)
    model = llama()
    inject(model, TARGETS, **{"r": 2, "seed": 1, **settings})
    return model


def values(model):
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def base_values(model):
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in values(model).items() if name in frozen}


def trained_keys(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def trainer(model, folder, steps=6, **settings):
    from lora_inject.integrations.transformers import AdapterCheckpoint

    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.02,
        save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    return tf.Trainer(
        model, arguments, train_dataset=Tokens(), eval_dataset=Tokens(),
        callbacks=[AdapterCheckpoint()],
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{}, {"bias": "all"}, {"train_also": ["lm_head", "norm"], "dropout": 0.3}]
)
def test_trainer_writes_adapters_alone_and_resumes_bit_for_bit(tmp_path, settings):
    model = adapted(**settings)
    before, base = snapshot(model), base_values(model)
    run = trainer(model, tmp_path / "a")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert base_values(model) == base
    # Trainer leaves a model in training mode, and flags of its own on it.
    changed = set(changed_parts(before, snapshot(model)))
    assert changed <= {"state", "training", "attributes"}
    assert "save_pretrained" not in vars(model)

    checkpoint = tmp_path / "a" / "checkpoint-3"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == {*trained_keys(model), ENTRY}
    tensors = [file.name for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
    assert sorted(tensors) == ["adapter_model.safetensors", "model.safetensors"]

    again = adapted(**settings)
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(checkpoint))
    assert values(again) == values(model)
    strip(again)
    strip(model)
    assert values(again) == values(model)


def test_resuming_says_nothing_of_the_base_which_is_in_no_checkpoint(tmp_path, caplog):
    trainer(adapted(), tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    caplog.clear()
    tf.logging.enable_propagation()  # of transformers' loggers, to where pytest listens
    try:
        trainer(adapted(), tmp_path).train(resume_from_checkpoint=checkpoint)
    finally:
        tf.logging.disable_propagation()
    assert "keys in the checkpoint" not in caplog.text


def test_resuming_without_inject_says_what_to_do_and_after_it_goes_on(tmp_path):
    trainer(adapted(), tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    model = llama()
    with pytest.raises(LoRAInjectError, match=r"has none\. Call inject with the arguments of"):
        trainer(model, tmp_path).train(resume_from_checkpoint=checkpoint)
    model.load_state_dict(model.state_dict())


def tied(**settings):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    before = snapshot(model)
    inject(model, settings.pop("targets", ["q_proj"]), r=2, seed=0, **settings)
    return model, before


def test_save_pretrained_keeps_an_adapter_of_tied_layers_once(tmp_path):
    model, before = tied(targets=["embed_tokens", "q_proj"])
    randomize_adapters(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.lora_A" in saved
    assert "lm_head.lora_A" not in saved
    other, _ = tied(targets=["embed_tokens", "q_proj"])
    other.load_state_dict(saved, strict=False)
    x = torch.arange(6)[None]
    assert torch.equal(other(x).logits, model(x).logits)
    with disabled(model):
        model.save_pretrained(tmp_path / "base")
    strip(model)
    assert set(changed_parts(before, snapshot(model))) == set()


def test_a_tied_module_that_trains_is_refused_at_the_start_and_the_remedy_works(tmp_path):
    from lora_inject.integrations.transformers import AdapterCheckpoint

    model, _ = tied(train_also=["embed_tokens"])
    run = trainer(model, tmp_path / "a", steps=1)
    with pytest.raises(FormatError, match=r"AdapterCheckpoint cannot .* tied .*peft=False"):
        run.train()
    assert run.state.global_step == 0
    run.remove_callback(AdapterCheckpoint)
    run.add_callback(AdapterCheckpoint(peft=False))
    run.args.save_steps = 1
    run.train()
    saved = load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    assert set(saved) == {*trained_keys(model), ENTRY}


def test_training_again_notes_nothing_twice(tmp_path):
    model = adapted()
    before = set(vars(model))
    run = trainer(model, tmp_path, steps=1)
    for _ in range(3):
        run.train()
        assert [name for name, _ in state_of(model).reach.lent] == ["load_state_dict"]
    strip(model)
    assert not {"load_state_dict", "save_pretrained"} & (set(vars(model)) - before)


def test_a_checkpoint_of_trainer_is_a_peft_directory(tmp_path):
    model = adapted()
    trainer(model, tmp_path, steps=3).train()
    torch.manual_seed(0)
    other = llama()
    load(other, tmp_path / "checkpoint-3")
    expected, got = lora_state_dict(model), lora_state_dict(other)
    assert {k: raw(v) for k, v in got.items()} == {k: raw(v) for k, v in expected.items()}
    config = json.loads((tmp_path / "checkpoint-3" / "adapter_config.json").read_text())
    assert config["r"] == 2


@pytest.mark.client("transformers")
def test_a_second_callback_that_is_taken_off_again_leaves_the_first_one(tmp_path):
    from lora_inject.integrations.transformers import AdapterCheckpoint

    run, second = trainer(adapted(), tmp_path / "run", steps=1), AdapterCheckpoint(peft=False)
    run.add_callback(second)
    run.train()
    run.remove_callback(second)
    run.save_model(str(tmp_path / "end"))
    assert [f.name for f in (tmp_path / "end").glob("*.safetensors")] == [
        "adapter_model.safetensors"
    ]


@pytest.mark.client("transformers")
def test_what_trainer_saves_at_its_end_is_an_adapter(tmp_path):
    from lora_inject.integrations.transformers import AdapterCheckpoint

    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    inject(model, TARGETS, r=2)
    run = trainer(model, tmp_path / "run", steps=3)
    run.train()
    run.save_model(str(tmp_path / "end"))
    tensors = [file.name for file in (tmp_path / "end").glob("*.safetensors")]
    assert tensors == ["adapter_model.safetensors"]
    expected = outputs(model.eval())
    ours = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    load(ours, tmp_path / "end")
    assert torch.equal(outputs(ours), expected)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "end")  # through PEFT
    torch.testing.assert_close(outputs(theirs), expected)

    run.remove_callback(AdapterCheckpoint)
    run.save_model(str(tmp_path / "whole"))
    assert "model.embed_tokens.weight" in load_file(tmp_path / "whole" / "model.safetensors")
    run.add_callback(AdapterCheckpoint())
    with merged(model):
        run.save_model(str(tmp_path / "merged"))
    whole = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(whole), expected)
    strip(model, merge=True)
    run.save_model(str(tmp_path / "stripped"))
    whole = tf.LlamaForCausalLM.from_pretrained(tmp_path / "stripped")
    torch.testing.assert_close(outputs(whole), expected)


def test_what_trainer_pushes_to_the_hub_is_an_adapter(tmp_path, monkeypatch):
    pushed = []
    hub = SimpleNamespace(upload_folder=lambda **said: pushed.append(said))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model = adapted()
    run = trainer(model, tmp_path, steps=1)
    run.train()
    run.hub_model_id = "user/name"
    run.push_to_hub()
    assert [str(said["folder_path"]) for said in pushed] == [str(tmp_path)]
    assert not (tmp_path / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    torch.manual_seed(0)
    other = llama()
    load(other, tmp_path)
    assert torch.equal(outputs(other), outputs(model.eval()))


def test_where_something_else_trains_the_whole_model_is_saved(tmp_path):
    model = adapted()
    run = trainer(model, tmp_path / "run", steps=1)
    run.train()
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(LoRAInjectWarning, match=r"norm.*So the whole model is written"):
        run.save_model(str(tmp_path / "end"))
    assert "model.norm.weight" in load_file(tmp_path / "end" / "model.safetensors")


def test_a_checkpoint_of_a_part_that_was_adapted_has_its_settings(tmp_path):
    def build(**settings):
        torch.manual_seed(0)
        model = llama()
        inject(model.model, TARGETS, r=2, seed=1, **settings)
        return model

    model, again, other = build(), build(), build(alpha=16)
    trainer(model, tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    assert f"model.{ENTRY}" in load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    trainer(again, tmp_path).train(resume_from_checkpoint=checkpoint)
    assert values(again) == values(model)
    with pytest.raises(FormatError, match="alpha=16"):
        trainer(other, tmp_path).train(resume_from_checkpoint=checkpoint)


def test_trainer_with_several_adapters_and_checkpointing(tmp_path):
    def build():
        model = adapted()
        inject(model, ["o_proj"], r=2, seed=2, adapter="fr")
        return model

    switch = {
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": True},
    }
    model, again = build(), build()
    trainer(model, tmp_path, **switch).train()
    assert (tmp_path / "checkpoint-3" / "fr" / "adapter_config.json").exists()
    trainer(again, tmp_path, **switch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(again) == values(model)
    trained = {k: v for k, v in model.named_parameters() if "lora_B" in k}
    assert all(parameter.abs().max() > 0 for parameter in trained.values())


def test_trainer_loads_the_best_adapter_at_the_end(tmp_path):
    model = adapted()
    run = trainer(
        model, tmp_path, steps=6, eval_strategy="steps", eval_steps=3, save_strategy="best",
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    best = load_file(tmp_path / f"checkpoint-{run.state.best_global_step}" / "model.safetensors")
    settings = best.pop(ENTRY)
    assert torch.equal(settings, as_entry(model))
    assert {k: raw(v) for k, v in best.items()} == {
        k: raw(v) for k, v in model.state_dict().items() if k in best
    }
    assert set(best) == trained_keys(model)


def test_the_callback_of_trainer_refuses_what_it_cannot_resume(tmp_path):
    with pytest.raises(LoRAInjectError, match="no adapters"):
        trainer(llama(), tmp_path).train()
    model = adapted()
    merge(model)
    with pytest.raises(LoRAInjectError, match="merged"):
        trainer(model, tmp_path).train()
    plain = Net()
    inject(plain, ["q_proj"], r=2)
    with pytest.raises(LoRAInjectError, match="resumes a Net from whole checkpoints only"):
        trainer(plain, tmp_path).train()


@pytest.mark.parametrize(
    "other", [{"targets": ["o_proj"]}, {"r": 3}, {"adapter": "fr"}, {"train_also": ["norm"]}]
)
def test_trainer_does_not_resume_other_adapters(tmp_path, other):
    trainer(adapted(), tmp_path).train()
    model = llama()
    inject(model, **{"targets": ["q_proj", "v_proj"], "r": 2, **other})
    before = values(model)
    with pytest.raises(FormatError, match="the checkpoint does not fit the model"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(model) == before


@LIGHTNING_WARNS
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"alpha": 16}, "alpha=16"),
        ({"scaling": "rslora"}, "rslora"),
        ({"fixed": "A"}, "A fixed"),
    ],
)
def test_no_trainer_resumes_adapters_of_other_settings(tmp_path, other, named):
    """Every tensor fits, and would compute something else."""
    trainer(adapted(), tmp_path / "t").train()
    fit(Module(adapted()), tmp_path, steps=4)
    model = adapted(**other)
    before = values(model)
    with pytest.raises(
        FormatError, match=f"4 of the pairs .* r=2, alpha=2, .*here it is r=2.*{named}"
    ):
        trainer(model, tmp_path / "t").train(
            resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-3")
        )
    assert values(model) == before
    with pytest.raises(FormatError, match=named):
        fit(Module(model), tmp_path, checkpoint=tmp_path / "step=4.ckpt")
    assert values(model) == before


def test_a_checkpoint_of_before_settings_travelled_resumes(tmp_path):
    model, again = adapted(), adapted()
    trainer(model, tmp_path).train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    tensors = load_file(file)
    del tensors[ENTRY]
    save_file(tensors, file, {"format": "pt"})
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(again) == values(model)


def test_a_checkpoint_holds_whatever_trains(tmp_path):
    def build():
        model = adapted()
        model.model.norm.weight.requires_grad_(True)
        return model

    model, again = build(), build()
    trainer(model, tmp_path).train()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(again) == values(model)
    whole = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    whole.requires_grad_(False)[1].requires_grad_(True)
    inject(whole[2], "0", r=2)
    moving = {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    adapters = {"2.0.lora_A", "2.0.lora_B"}
    assert trained_tensors(whole).keys() == {"1.weight", "1.bias"} | moving | adapters


def test_an_interrupted_trainer_leaves_the_model_usable(tmp_path):
    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = adapted()
    run = trainer(model, tmp_path)
    run.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    model.save_pretrained(tmp_path / "whole")
    assert "model.embed_tokens.weight" in load_file(tmp_path / "whole" / "model.safetensors")
    strip(model)
    assert not {"save_pretrained", "load_state_dict"} & vars(model).keys()
    model.save_pretrained(tmp_path / "bare")


def accelerated(model, folder, resume=False):
    """Train with accelerate for 6 steps; save its state after step 3, or start from it."""
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.02)
    batches = DataLoader(Tokens(), 4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    stream = [batch for _ in range(2) for batch in batches]

    def write(models, weights, folder):
        save(models[0], folder)
        weights.clear()  # the whole model's, which accelerate would write

    def read(models, folder):
        load(models.pop(), folder)

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)
    if resume:
        accelerator.load_state(folder)
    for step in range(3 if resume else 0, 6):
        accelerator.backward(model(**stream[step]).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 2 and not resume:
            accelerator.save_state(folder)


def test_accelerate_trains_and_resumes_bit_for_bit(tmp_path):
    model, again = adapted(dropout=0.3), adapted(dropout=0.3)
    base = base_values(model)
    accelerated(model.train(), tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.suffix == ".safetensors"] == [
        "adapter_model.safetensors"
    ]
    accelerated(again.train(), tmp_path, resume=True)
    assert values(again) == values(model)
    assert base_values(model) == base
    strip(model)


def with_a_call(models, folder, resume=False):
    """The same by ``checkpoint_adapters``, with another model beside the adapted ones."""
    from lora_inject.integrations.accelerate import checkpoint_adapters

    accelerator = accelerate.Accelerator(cpu=True)
    checkpoint_adapters(accelerator)
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    *models, optimizer = accelerator.prepare(*models, torch.optim.AdamW(parameters, lr=0.02))
    if resume:
        accelerator.load_state(folder)
    for step in range(3 if resume else 0, 6):
        ids = Tokens()[step]["input_ids"][None]
        logits = models[0](input_ids=ids).logits + models[2](input_ids=ids).logits
        accelerator.backward(models[1](logits).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step == 2 and not resume:
            accelerator.save_state(folder)


def three(**settings):
    torch.manual_seed(5)
    return [adapted(dropout=0.3, **settings).train(), nn.Linear(64, 2), adapted(bias="all").train()]


def test_accelerate_writes_adapters_alone_with_one_call(tmp_path):
    models, again = three(), three()
    with_a_call(models, tmp_path)
    files = {file.name: set(load_file(file)) for file in tmp_path.glob("*.safetensors")}
    assert files == {
        "adapters.safetensors": {*trained_keys(models[0]), ENTRY},
        "adapters_2.safetensors": {*trained_keys(models[2]), ENTRY},
        "model.safetensors": {"weight", "bias"},
    }
    with_a_call(again, tmp_path, resume=True)
    assert [values(model) for model in again] == [values(model) for model in models]
    for other, said in (({"alpha": 16}, "other settings"), ({"r": 3}, "does not fit")):
        different = three(**{"r": 2, **other})
        before = values(different[0])
        with pytest.raises(FormatError, match=said):
            with_a_call(different, tmp_path, resume=True)
        assert values(different[0]) == before


def outputs(model):
    with torch.no_grad():
        return model(input_ids=Tokens()[3]["input_ids"][None]).logits


def offload(model):
    accelerate.cpu_offload(model, execution_device="cpu")


def dispatch(model):
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("hook", [offload, dispatch])
@pytest.mark.parametrize("how", ["auto", "weight"])
def test_under_hooks_of_accelerate_that_come_after_inject_everything_goes_on(hook, how):
    torch.manual_seed(0)
    model = llama()
    base = outputs(model)
    before = snapshot(model)
    inject(model, TARGETS, r=2, how=how)
    randomize_adapters(model)
    expected = outputs(model)
    hook(model)
    assert all("forward" in vars(layer.self_attn.q_proj) for layer in model.model.layers)
    assert torch.equal(outputs(model), expected)
    with disabled(model):
        assert torch.equal(outputs(model), base)
    use(model)
    assert torch.equal(outputs(model), base)
    use(model, "default")
    assert torch.equal(outputs(model), expected)
    if hook is dispatch:
        inputs = Tokens()[3]["input_ids"][None]
        model(input_ids=inputs, labels=inputs).loss.backward()
        assert all(p.grad is not None for p in lora_parameters(model))
        with merged(model):
            torch.testing.assert_close(outputs(model), expected)
    else:
        with pytest.raises(LoRAInjectError, match=r"q_proj: accelerate has offloaded.*remove_hook"):
            strip(model)
        assert torch.equal(outputs(model), expected)
        accelerate.hooks.remove_hook_from_submodules(model)
    strip(model)
    assert torch.equal(outputs(model), base)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(outputs(model), base)
    # accelerate leaves attributes behind, and replaces the Parameters that it has offloaded.
    assert set(changed_parts(before, snapshot(model))) <= {"attributes", "parameters"}


def test_hooks_of_accelerate_may_go_before_strip_does():
    model = llama()
    base = outputs(model)
    inject(model, TARGETS, r=2)
    randomize_adapters(model)
    expected = outputs(model)
    dispatch(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(outputs(model), expected)
    strip(model)
    assert torch.equal(outputs(model), base)


@pytest.mark.parametrize("hook", [offload, dispatch])
def test_to_inject_under_hooks_of_accelerate_is_refused(hook):
    model = llama()
    hook(model)
    before = [vars(module).keys() for module in model.modules()]
    with pytest.raises(UnsupportedLayerError, match="accelerate"):
        inject(model, TARGETS, r=2)
    assert [vars(module).keys() for module in model.modules()] == before


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(lora_parameters(self.model), lr=0.02)


def fit(module, folder, steps=8, checkpoint=None):
    from lora_inject.integrations.lightning import AdapterCheckpoint

    lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[
            AdapterCheckpoint(),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1),
        ],
    ).fit(module, DataLoader(Tokens(), 4), ckpt_path=checkpoint)  # fmt: skip


@LIGHTNING_WARNS
@pytest.mark.parametrize("settings", [{}, {"bias": "all", "train_also": ["lm_head"]}])
def test_lightning_writes_adapters_alone_and_resumes_bit_for_bit(tmp_path, settings):
    module, again = Module(adapted(**settings)), Module(adapted(**settings))
    base = base_values(module)
    fit(module, tmp_path)
    assert base_values(module) == base
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == trained_keys(module)
    fit(again, tmp_path / "again", checkpoint=tmp_path / "step=4.ckpt")
    assert values(again) == values(module)
    assert again.strict_loading
    start = adapted(**settings)
    assert values(start) != values(module.model)
    strip(module), strip(start)
    assert values(module.model) == values(start)


@LIGHTNING_WARNS
@pytest.mark.filterwarnings("ignore:the model has no adapters")  # of its optimizer
def test_lightning_refuses_checkpoints_of_other_adapters_and_models_without(tmp_path):
    fit(Module(adapted()), tmp_path, steps=4)
    other = llama()
    inject(other, ["o_proj"], r=2)
    with pytest.raises(FormatError, match=r"4 missing.*8 unexpected"):
        fit(Module(other), tmp_path, checkpoint=tmp_path / "step=4.ckpt")
    with pytest.raises(LoRAInjectError, match="no adapters"):
        fit(Module(llama()), tmp_path)


class Late(Module):
    """Makes its model where Lightning wants it made, which is after the callbacks' setup."""

    def __init__(self, where):
        lightning.LightningModule.__init__(self)
        self.where, self.model = where, None

    def setup(self, stage):
        if self.where == "setup":
            self.model = adapted()

    def configure_model(self):
        if self.where == "configure_model" and self.model is None:
            self.model = adapted()


@LIGHTNING_WARNS
@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_lightning_may_make_the_model_late(tmp_path, where):
    late, again, early = Late(where), Late(where), Module(adapted())
    fit(late, tmp_path)
    fit(early, tmp_path / "early")
    assert values(late) == values(early)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == trained_keys(late)
    fit(again, tmp_path / "again", checkpoint=tmp_path / "step=4.ckpt")
    assert values(again) == values(late)


@LIGHTNING_WARNS
def test_an_error_before_lightnings_setup_is_its_own(tmp_path):
    class Unprepared(Module):
        def prepare_data(self):
            raise OSError("no disk")

    module = Unprepared(adapted())
    with pytest.raises(OSError, match="no disk"):
        fit(module, tmp_path)
    assert module.strict_loading


@pytest.mark.usefixtures("device")
def test_generate_with_adapters_on_disabled_and_merged():
    model = adapted()
    base = llama()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    run = torch.optim.AdamW(lora_parameters(model), lr=0.05)
    batch = next(iter(DataLoader(Tokens(), 8)))
    for _ in range(20):
        model(**batch).loss.backward()
        run.step()
        run.zero_grad()
    model.eval(), base.eval()
    prompt = batch["input_ids"][:2, :3]

    def written(m, cached=True):
        return m.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
            use_cache=cached, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    on = written(model)
    assert torch.equal(on, written(model, cached=False))
    assert not torch.equal(on, written(base))
    with merged(model):
        assert torch.equal(on, written(model))
    with disabled(model):
        assert torch.equal(written(base), written(model))
    strip(model)
    assert torch.equal(written(base), written(model))


def test_nothing_of_the_integrations_is_imported_with_the_library():
    code = (
        "import sys, lora_inject; print([n for n in sys.modules if n.startswith("
        "('lora_inject.integrations', 'transformers', 'lightning', 'accelerate', 'onnx'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
