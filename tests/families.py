"""Real model families, built from small configs."""

from dataclasses import dataclass

import pytest
import torch
import transformers as tf


@dataclass(frozen=True)
class Family:
    """How to build a small model, feed it, and what its attention projections are called."""

    build: object
    inputs: object
    targets: tuple[str, ...]
    linears: int  # Linear-like layers without the head


def _ids(**extra):
    return {"input_ids": torch.randint(3, 60, (2, 7)), **extra}


DECODER = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama():
    config = tf.LlamaConfig(**DECODER)
    return tf.LlamaForCausalLM(config)


def gpt2():
    config = tf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def bert():
    config = tf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24,
    )  # fmt: skip
    return tf.BertModel(config)


def t5():
    config = tf.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def vit():
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


def mixtral(experts="eager"):
    config = tf.MixtralConfig(
        **DECODER, num_local_experts=4, num_experts_per_tok=2, experts_implementation=experts
    )
    return tf.MixtralForCausalLM(config)


def qwen3_moe(experts="eager"):
    config = tf.Qwen3MoeConfig(
        **DECODER, moe_intermediate_size=12, head_dim=4, num_experts=4, num_experts_per_tok=2,
        experts_implementation=experts,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config)


def unet():
    """A UNet with cross attention and convolutions; without diffusers its test is skipped."""
    return pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()  # fmt: skip


FAMILIES = {
    "llama": Family(llama, _ids, ("q_proj", "v_proj"), 2 * 7),
    "gpt2": Family(gpt2, _ids, ("c_attn",), 2 * 4),
    "bert": Family(bert, _ids, ("query", "value"), 2 * 6 + 1),
    "t5": Family(t5, lambda: _ids(decoder_input_ids=torch.randint(3, 60, (2, 4))), ("q", "v"), 32),
    "mixtral": Family(mixtral, _ids, ("q_proj", "v_proj"), 2 * 4),
    "qwen3_moe": Family(qwen3_moe, _ids, ("q_proj", "v_proj"), 2 * 4),
    "vit": Family(vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}, ("q_proj", "v_proj"), 12),
}
