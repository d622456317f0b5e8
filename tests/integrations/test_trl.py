"""TRL trains adapted models as it trains PEFT's: the policy is its own reference."""

import copy
import math

import accelerate
import pytest
import torch
import transformers as tf
from helpers import raw

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    disabled,
    inject,
    load,
    lora_state_dict,
    merged,
    remove,
    strip,
    use,
)

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from lora_inject.integrations.transformers import AdapterCheckpoint  # noqa: E402
from lora_inject.integrations.trl import connect, reference  # noqa: E402

pytestmark = [
    pytest.mark.cpu("trainers choose devices themselves"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
TARGETS = ["q_proj", "v_proj"]
PAIRS = {
    "prompt": ["a b", "c d"] * 4,
    "chosen": [" e f g", " h i"] * 4,
    "rejected": [" j k", " l a b"] * 4,
}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def base(**settings):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, **settings,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def adapted(**settings):
    model = base()
    inject(model, TARGETS, **{"r": 2, "alpha": 8, "seed": 1, **settings})
    return model


def trained(**settings):
    """An adapter as supervised training may have left it."""
    model = adapted(**settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def of_peft(model):
    """PEFT's model of the same base and the same adapter."""
    own, bare = lora_state_dict(model, format="peft"), copy.deepcopy(model)
    strip(bare)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(bare, config)
    peft.set_peft_model_state_dict(theirs, own)
    return theirs


def arguments(kind, folder, **settings):
    return kind(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.02,
        logging_steps=1, lr_scheduler_type="constant", report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, dataloader_pin_memory=False, **{"save_strategy": "no", **settings},
    )  # fmt: skip


def dpo(model, ref, folder, **settings):
    return trl.DPOTrainer(
        model, ref, arguments(trl.DPOConfig, folder, **settings), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
    )  # fmt: skip


def kto(model, ref, folder):
    examples = {
        "prompt": PAIRS["prompt"],
        "completion": [*PAIRS["chosen"][:4], *PAIRS["rejected"][:4]],
        "label": [True] * 4 + [False] * 4,
    }
    return trl.KTOTrainer(
        model, ref, arguments(trl.KTOConfig, folder), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_dict(examples),
    )  # fmt: skip


def reward(completions, **_):
    return [float(text.split().count("e") - text.split().count("j")) for text in completions]


def grpo(model, folder, kind="GRPO", **settings):
    settings |= {"num_generations": 4, "max_completion_length": 4}
    return getattr(trl, f"{kind}Trainer")(
        model, reward_funcs=reward, processing_class=tokenizer(),
        args=arguments(getattr(trl, f"{kind}Config"), folder, **settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]}),
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.client("trl")
@pytest.mark.parametrize("start", [adapted, trained])
@pytest.mark.parametrize("make", [dpo, kto])
def test_losses_are_those_of_peft_and_of_log_2_at_first(make, start, tmp_path):
    model = start()
    theirs = losses(make(of_peft(model), None, tmp_path / "theirs"))
    ours = losses(make(model, reference(model), tmp_path / "ours"))
    assert ours == pytest.approx(theirs, abs=1e-6)
    if make is dpo:
        assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
        assert ours[-1] < ours[0]


@pytest.mark.client("trl")
@pytest.mark.parametrize(
    ("kind", "start"), [("GRPO", adapted), ("GRPO", trained), ("RLOO", adapted)]
)
def test_online_trainers_have_the_losses_of_peft_and_load_no_second_model(kind, start, tmp_path):
    model = start()
    theirs = losses(grpo(of_peft(model), tmp_path / "theirs", kind, beta=0.5))
    trainer = grpo(model, tmp_path / "ours", kind, beta=0.0)
    connect(trainer, beta=0.5)
    assert not list(trainer.ref_model.parameters())
    assert losses(trainer) == pytest.approx(theirs, abs=1e-6)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4


def test_on_a_merged_base_the_first_loss_is_log_2(tmp_path):
    """TRL would load the base from before the merge."""
    model = trained()
    strip(model, merge=True)
    inject(model, TARGETS, r=2)
    trainer = dpo(model, reference(model), tmp_path, disable_dropout=False)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": "all"}, {"train_also": ["lm_head", "norm"]}, {"variant": "dora"},
     {"init": "pissa", "targets": ["embed_tokens", "q_proj"]}],
)  # fmt: skip
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_reference_is_what_the_policy_was(is_trained, settings):
    model = base(attention_bias=True, tie_word_embeddings="init" in settings)
    inject(model, **{"targets": TARGETS, "r": 2, **settings})
    if is_trained:
        _move(model)
    ids = torch.arange(3, 9)[None]
    first = model(input_ids=ids).logits.detach()
    ref = reference(model)
    assert torch.equal(model(input_ids=ids).logits, first)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=ids).logits.sum().backward()
    gradients = {n: raw(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    _move(model)
    moved = model(input_ids=ids).logits.detach()
    assert not torch.equal(moved, first)
    assert torch.equal(ref(input_ids=ids).logits, first)
    assert torch.equal(model(input_ids=ids).logits, moved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    now = {n: raw(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    assert now == gradients
    assert model.training
    strip(model)


def _move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.3


def test_a_reference_is_called_between_a_forward_pass_and_its_backward_pass():
    """As by DPO; also where the backward pass computes blocks again."""
    model, ids = trained(), torch.arange(3, 9)[None]
    ref = reference(model)
    model(input_ids=ids).logits.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    y = model(input_ids=ids).logits
    ref(input_ids=ids)
    y.square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_a_reference_drops_nothing_out():
    model = base(attention_dropout=0.5)
    inject(model, TARGETS, r=2, dropout=0.5)
    ref, ids = reference(model.train()), torch.arange(3, 9)[None]
    assert torch.equal(ref(input_ids=ids).logits, ref(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_that_does_not_train_may_be_the_reference():
    model, ids = trained(adapter="sft"), torch.arange(3, 9)[None]
    expected = model(input_ids=ids).logits.detach()
    inject(model, TARGETS, r=2, adapter="dpo")
    use(model, "sft", "dpo", train="dpo")
    for ref in (reference(model), reference(model, "sft")):
        _move(model)
        assert torch.equal(ref(input_ids=ids).logits, expected)
    use(model, "dpo")
    with disabled(model):
        bare = model(input_ids=ids).logits
    assert not torch.equal(bare, expected)


def test_a_reference_that_is_there_no_more_or_trains_is_refused_where_it_is_called():
    model, ids = trained(adapter="sft"), torch.arange(3, 9)[None]
    inject(model, TARGETS, r=2, adapter="dpo")
    use(model, "sft", "dpo", train="dpo")
    ref = reference(model)
    use(model, "sft", "dpo", train=["sft", "dpo"])
    with pytest.raises(LoRAInjectError, match=r"'sft' is the reference, and trains now.*Freeze"):
        ref(input_ids=ids)
    use(model, "dpo")
    ref(input_ids=ids)
    for block, problem in ((disabled, "inside a disabled block"), (merged, "is merged now")):
        with block(model), pytest.raises(LoRAInjectError, match=problem):
            ref(input_ids=ids)
    remove(model, "sft")
    with pytest.raises(LoRAInjectError, match="no adapter 'sft'"):
        ref(input_ids=ids)
    strip(model)
    with pytest.raises(LoRAInjectError, match="has no adapters"):
        ref(input_ids=ids)


def test_what_cannot_be_a_reference_is_refused_with_the_remedy():
    with pytest.raises(LoRAInjectError, match=r"would load its reference .*Call inject first"):
        reference(base())
    model = trained()
    with pytest.raises(ArgumentError, match="'default' trains"):
        reference(model, "default")
    with pytest.raises(ArgumentError, match="no adapter 'sft'"):
        reference(model, "sft")
    with merged(model), pytest.raises(LoRAInjectError, match="merged"):
        reference(model)
    reference(model)
    with pytest.raises(ArgumentError, match=r"an adapter 'ref' already.*remove\(model, 'ref'\)"):
        reference(model)


def test_a_trainer_that_would_move_its_reference_is_refused_before_a_step(tmp_path):
    model = adapted()
    before = {key: raw(t) for key, t in model.state_dict().items()}
    trainer = dpo(model, reference(model), tmp_path, sync_ref_model=True)
    with pytest.raises(LoRAInjectError, match="sync_ref_model=False"):
        trainer.train()
    assert {key: raw(t) for key, t in model.state_dict().items()} == before
    with pytest.raises(LoRAInjectError, match="sync_ref_model=False"):
        connect(trainer)


@pytest.mark.client("trl")
def test_a_run_with_a_copy_for_its_reference_resumes_and_is_saved_as_peft_has_it(tmp_path):
    def run(folder=tmp_path / "run", **settings):
        model = trained()
        trainer = dpo(model, reference(model), folder, **settings)
        trainer.add_callback(AdapterCheckpoint())
        return model, trainer

    model, trainer = run(save_strategy="steps", save_steps=1)
    trainer.train()
    again, resumed = run(save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    expected = {key: raw(t) for key, t in model.state_dict().items()}
    assert {key: raw(t) for key, t in again.state_dict().items()} == expected
    trainer.save_model(str(tmp_path / "end"))
    files = {file.relative_to(tmp_path / "end") for file in tmp_path.glob("end/**/adapter_config*")}
    assert sorted(map(str, files)) == ["adapter_config.json", "ref/adapter_config.json"]
    other, ids = base(), torch.arange(3, 9)[None]
    load(other, tmp_path / "end")
    assert torch.equal(other.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_what_trl_has_cached_of_one_reference_is_none_of_anothers(tmp_path):
    """Log-probabilities that are computed before training lie beside the data, by a hash."""
    from trl.trainer.utils import hash_module

    one, other = adapted(), trained()
    strip(other, merge=True)
    inject(other, TARGETS, r=2, alpha=8, seed=1)
    assert hash_module(reference(one)) != hash_module(reference(other))
    again = adapted()
    assert hash_module(reference(one)) == hash_module(reference(again))
    expected = losses(dpo(again, reference(again), tmp_path / "a"))
    trainer = dpo(one, reference(one), tmp_path / "b", precompute_ref_log_probs=True)
    assert losses(trainer) == pytest.approx(expected, abs=1e-6)


def test_trl_switches_the_dropout_of_adapters_off(tmp_path):
    model, ids = trained(dropout=0.5), torch.arange(3, 9)[None]
    expected = model.eval()(input_ids=ids).logits
    dpo(model, reference(model), tmp_path)
    assert torch.equal(model.train()(input_ids=ids).logits, expected)


def test_the_fused_head_of_trl_is_told(tmp_path):
    model = base()
    inject(model, ["q_proj", "lm_head"], r=2)
    with pytest.warns(LoRAInjectWarning, match=r"lm_head: its weight is read outside .*_fused_for"):
        dpo(model, reference(model), tmp_path).train()
    assert not model.lm_head.lora_B.any()
    model = base()
    inject(model, "lm_head", r=2, how="weight")
    dpo(model, reference(model), tmp_path).train()
    assert model.lm_head.lora_B.any()


class Engine:
    """What TRL's vLLM client is given, kept as vLLM would take it."""

    def __init__(self):
        self.got, self.said = {}, []

    def update_named_params(self, metadata, named):
        self.said = metadata
        self.got = {name: tensor.clone() for name, tensor in named}

    def reset_prefix_cache(self):
        pass


def generation(model):
    """TRL's own side of vLLM, without vLLM."""
    from trl.generation import vllm_generation as theirs

    made = theirs.VLLMGeneration.__new__(theirs.VLLMGeneration)
    made.model, made.accelerator = model, accelerate.Accelerator(cpu=True)
    made._dist = theirs.DistributedBackend(made.accelerator)
    made.mode, made._weight_metadata = "server", None
    made.vllm_client = Engine()
    return made


@pytest.mark.client("trl")
@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"adapter": "fr"}])
def test_vllm_gets_what_the_model_computes_with_under_its_own_names(settings, tmp_path):
    bare, model = base(), trained(**settings)
    inject(model, ["o_proj"], r=2, adapter="unused")
    use(model, settings.get("adapter", "default"))
    before = {key: raw(t) for key, t in model.state_dict().items()}
    trainer = grpo(model, tmp_path, beta=0.0)
    trainer.vllm_generation = generation(model)
    connect(trainer)
    trainer.vllm_generation.sync_weights()
    engine = trainer.vllm_generation.vllm_client
    assert list(engine.got) == [name for name, _ in bare.named_parameters()]
    assert [(name, shape) for name, _, shape in engine.said] == [
        (name, list(t.shape)) for name, t in engine.got.items()
    ]
    ids = torch.arange(3, 9)[None]
    bare.load_state_dict(engine.got)
    torch.testing.assert_close(bare(input_ids=ids).logits, model(input_ids=ids).logits)
    assert {key: raw(t) for key, t in model.state_dict().items()} == before
    _move(model)
    trainer.vllm_generation.sync_weights()
    bare.load_state_dict(engine.got)
    torch.testing.assert_close(bare(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.client("trl")
def test_vllm_gets_what_it_gets_of_peft(tmp_path):
    model = trained()
    theirs = generation(of_peft(model))
    theirs.sync_weights()
    trainer = grpo(model, tmp_path, beta=0.0)
    trainer.vllm_generation = generation(model)
    connect(trainer)
    trainer.vllm_generation.sync_weights()
    ours = trainer.vllm_generation.vllm_client
    assert ours.said == theirs.vllm_client.said
    for name, tensor in theirs.vllm_client.got.items():
        torch.testing.assert_close(ours.got[name], tensor)
