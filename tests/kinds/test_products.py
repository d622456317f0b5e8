"""Which parameters count as matrices that their module multiplies by."""

import transformers as tf

from lora_inject import plan


def test_code_with_constants_of_any_kind_is_read():
    """The position embedding of Wav2Vec2 has an empty tuple among its constants."""
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8,) * 7, num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=8,
    )  # fmt: skip
    assert len(plan(tf.Wav2Vec2Model(config)).sites) == 7
