"""The trainer of sentence-transformers writes adapters, resumes from them and loads the best."""

import pytest
import torch
import transformers as tf
from helpers import PEFT_WARNS, randomize_adapters, raw
from safetensors.torch import load_file

from lora_inject import FormatError, LoRAInjectError, inject, load, merged, report, strip
from lora_inject.integrations.transformers import AdapterCheckpoint

st = pytest.importorskip(
    "sentence_transformers", reason="it is not installed: pip install sentence-transformers"
)
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

pytestmark = [PEFT_WARNS, pytest.mark.cpu("trainers choose devices themselves")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"]
TARGETS = ["query", "value"]
TEXTS = ["a b c", "d e f", "g h i", "j k l"] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory of a small encoder with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(folder)
    return folder


def encoder(base):
    return st.SentenceTransformer(str(base), device="cpu")


def adapted(base, **settings):
    model = encoder(base)
    inject(model[0].auto_model, TARGETS, **{"r": 2, "seed": 1, **settings})
    return model


def trainer(model, folder, callbacks=None, **settings):
    texts = datasets.Dataset.from_dict(
        {"one": TEXTS, "other": TEXTS[::-1], "label": [1.0, 0.0, 0.5, 0.2] * 4}
    )
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05,
        save_steps=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    return st.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=texts, eval_dataset=texts,
        loss=CosineSimilarityLoss(model), callbacks=callbacks or [AdapterCheckpoint()],
    )  # fmt: skip


def values(model):
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def trained_keys(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.client("sentence-transformers")
def test_it_writes_adapters_alone_and_resumes_bit_for_bit(base, tmp_path):
    model, again = adapted(base), adapted(base)
    start = values(model)
    trainer(model, tmp_path).train()
    changed = {key for key, value in values(model).items() if start[key] != value}
    assert changed == trained_keys(model)
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "adapters.safetensors")
    assert set(saved) == {*trained_keys(model), "0.model.lora_settings"}
    assert not list(checkpoint.rglob("model.safetensors"))
    trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert values(again) == values(model)
    strip(again)


@pytest.mark.client("sentence-transformers")
def test_what_is_saved_at_the_end_is_read_by_both(base, tmp_path):
    model = adapted(base)
    run = trainer(model, tmp_path / "run", save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "end"))
    expected = model.encode(TEXTS[:4])
    theirs = st.SentenceTransformer(str(tmp_path / "end"), device="cpu")
    assert theirs.encode(TEXTS[:4]) == pytest.approx(expected, abs=1e-6)
    ours = encoder(base)
    load(ours[0].auto_model, tmp_path / "end")
    assert ours.encode(TEXTS[:4]) == pytest.approx(expected, abs=1e-6)
    with merged(model):
        model.save(str(tmp_path / "merged"))
    whole = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert whole.encode(TEXTS[:4]) == pytest.approx(expected, abs=1e-5)
    strip(model)
    run.save_model(str(tmp_path / "bare"))
    bare = st.SentenceTransformer(str(tmp_path / "bare"), device="cpu")
    assert bare.encode(TEXTS[:4]) == pytest.approx(encoder(base).encode(TEXTS[:4]), abs=1e-6)


def test_it_loads_the_best_adapter_at_the_end(base, tmp_path):
    model = adapted(base)
    run = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/adapters.safetensors")
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")  # and not the last one
    now = values(model)
    assert {key: raw(best[key]) for key in trained_keys(model)} == {
        key: now[key] for key in trained_keys(model)
    }


@pytest.mark.parametrize("other", [{"r": 3}, {"alpha": 16}])
def test_it_does_not_resume_other_adapters(base, tmp_path, other):
    trainer(adapted(base), tmp_path).train()
    model = adapted(base, **other)
    before = values(model)
    with pytest.raises(FormatError, match=r"does not fit|other settings"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert values(model) == before
    bare = encoder(base)
    with pytest.raises(LoRAInjectError, match="Call inject with the arguments of the first run"):
        trainer(bare, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_on_the_whole_model_there_are_checkpoints_without_peft(base, tmp_path):
    def whole():
        model = encoder(base)
        inject(model, TARGETS, r=2, seed=1)
        return model

    with pytest.raises(FormatError, match=r"peft=False\), or inject into 0\.model alone"):
        trainer(whole(), tmp_path / "a").train()
    callbacks = [AdapterCheckpoint(peft=False)]
    model, again = whole(), whole()
    trainer(model, tmp_path / "b", callbacks).train()
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    trainer(again, tmp_path / "b", callbacks).train(resume_from_checkpoint=checkpoint)
    assert values(again) == values(model)


def test_what_it_saves_by_itself_load_reads(base, tmp_path):
    """Without the callback a directory has everything, of which its own reader leaves A and B."""
    model = adapted(base)
    randomize_adapters(model)
    model.save(str(tmp_path / "all"))
    other = encoder(base)
    with pytest.warns(UserWarning, match="checkpoint of a whole model"):
        load(other[0].auto_model, tmp_path / "all", alpha=2)
    assert other.encode(TEXTS[:4]) == pytest.approx(model.encode(TEXTS[:4]), abs=1e-6)
    assert report(other).trainable
