"""Trainers audit a model at their first step, on its batch, and the run is what it is without."""

import lightning
import pytest
import torch
import transformers as tf
from helpers import snapshot
from test_trainers import LIGHTNING_WARNS, Tokens, adapted, values
from torch.utils.data import DataLoader

from lora_inject import LoRAInjectError, LoRAInjectWarning, lora_parameters
from lora_inject.integrations.lightning import AdapterCheckpoint as LightningCheckpoint
from lora_inject.integrations.transformers import AdapterCheckpoint, AuditFirstStep


def trained(model, folder, *callbacks, **settings):
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
        save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        gradient_accumulation_steps=2, **settings,
    )  # fmt: skip
    tf.Trainer(model, arguments, train_dataset=Tokens(), callbacks=[*callbacks]).train()
    return model


@pytest.mark.parametrize("callback", [AuditFirstStep, lambda: AdapterCheckpoint(audit=True)])
def test_the_trainer_trains_as_without_it(tmp_path, callback):
    plain = trained(adapted(dropout=0.1), tmp_path / "a", AdapterCheckpoint())
    other = adapted(dropout=0.1)
    before = snapshot(other)["hooks"]
    trained(other, tmp_path / "b", callback())
    assert values(plain) == values(other)
    assert snapshot(other)["hooks"] == before


def broken():
    model = adapted()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: args[-1].detach())
    return model


def test_what_is_found_is_a_warning_or_with_strict_an_error(tmp_path):
    for callback in (AuditFirstStep(), AdapterCheckpoint(audit=True)):
        with pytest.warns(LoRAInjectWarning, match="no-gradient"):
            trained(broken(), tmp_path, callback)
    with pytest.raises(LoRAInjectError, match="no-gradient"):
        trained(broken(), tmp_path, AuditFirstStep(strict=True))


def test_the_optimizer_of_the_run_is_audited(tmp_path):
    model = adapted()
    model.lm_head.weight.requires_grad_(True)  # which no adapter owns
    with pytest.warns(LoRAInjectWarning, match="thawed"):
        trained(model, tmp_path, AuditFirstStep())


class Lit(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(lora_parameters(self.model), lr=1e-3)


def lit(model, folder, **options):
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_steps=3, callbacks=[LightningCheckpoint(**options)], default_root_dir=folder,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Lit(model), DataLoader(Tokens(), batch_size=4))
    return model


@LIGHTNING_WARNS
def test_lightning_trains_as_without_it(tmp_path):
    plain, other = adapted(dropout=0.1), adapted(dropout=0.1)
    before = snapshot(other)["hooks"]
    assert values(lit(plain, tmp_path)) == values(lit(other, tmp_path, audit=True))
    assert snapshot(other)["hooks"] == before


@LIGHTNING_WARNS
def test_lightning_warns_of_what_is_found(tmp_path):
    with pytest.warns(LoRAInjectWarning, match="no-gradient"):
        lit(broken(), tmp_path, audit=True)
