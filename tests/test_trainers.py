"""transformers' Trainer, accelerate and Lightning train an injected model, save it and resume."""

import json

import pytest
import torch
import transformers as tf
from families import llama
from helpers import changed_parts, raw, snapshot
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lora_inject import (
    LoRAInjectError,
    disabled,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    merge,
    merged,
    strip,
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
    inject(model, TARGETS, r=2, seed=1, **settings)
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
    return tf.Trainer(model, arguments, train_dataset=Tokens(), callbacks=[AdapterCheckpoint()])


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
    changed = set(changed_parts(before, snapshot(model)))
    assert changed <= {"state", "training"}  # Trainer leaves a model in training mode

    checkpoint = tmp_path / "a" / "checkpoint-3"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == trained_keys(model)
    tensors = [
        file.name for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".bin")
    ]
    assert sorted(tensors) == ["adapter_model.safetensors", "model.safetensors"]

    again = adapted(**settings)
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(checkpoint))
    assert values(again) == values(model)
    strip(again)
    strip(model)
    assert values(again) == values(model)


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


def test_trainer_with_several_adapters_and_checkpointing(tmp_path):
    def build():
        model = adapted()
        inject(model, ["o_proj"], r=2, seed=2, adapter="fr")
        return model

    switch = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
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
    run.eval_dataset = Tokens()
    run.train()
    best = load_file(tmp_path / f"checkpoint-{run.state.best_global_step}" / "model.safetensors")
    assert {k: raw(v) for k, v in best.items()} == {
        k: raw(v) for k, v in model.state_dict().items() if k in best
    }
    assert set(best) == trained_keys(model)


class Plain(nn.Module):
    """A model of no library, as ``Trainer`` takes it."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_trainer_with_a_plain_module(tmp_path):
    def build():
        torch.manual_seed(0)
        model = Plain()
        inject(model, ["embed", "head"], r=2, seed=1)
        return model

    model, again = build(), build()
    trainer(model, tmp_path).train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(saved) == trained_keys(model)
    assert "state_dict" not in vars(model)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(again) == values(model)


def test_the_callbacks_refuse_a_model_without_adapters(tmp_path):
    with pytest.raises(LoRAInjectError, match="no adapters"):
        trainer(llama(), tmp_path).train()
    model = adapted()
    merge(model)
    with pytest.raises(LoRAInjectError, match="merged"):
        trainer(model, tmp_path).train()


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
