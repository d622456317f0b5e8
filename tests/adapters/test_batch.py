"""Which rows a layer sees: what is expanded from the batch is followed, others are refused."""

import pytest
import torch
import transformers as tf
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn

from lora_inject import LoRAInjectError, inject, per_row, use

pytestmark = pytest.mark.usefixtures("device")

TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def adapted(model, targets):
    torch.manual_seed(0)
    for name in ("fr", "de"):
        inject(model.double().eval(), targets, r=2, adapter=name)
    randomize_adapters(model, 0.3)
    return model


def vision_language(targets):
    torch.manual_seed(0)
    images = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=images, image_token_index=59,
        vision_feature_layer=-1,
    )  # fmt: skip
    return adapted(tf.LlavaForConditionalGeneration(config), targets)


def two_images_in_the_first_row():
    ids = torch.tensor([[1] + [59] * 8 + [5, 6], [1] + [7] * 8 + [5, 6]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.double)}


@pytest.mark.parametrize("targets", [["re:.*vision.*q_proj"], ["linear_1"]])
def test_images_are_not_taken_for_rows(targets):
    model, inputs = vision_language(targets), two_images_in_the_first_row()
    with per_row(model, ["fr", "de"]):
        with pytest.raises(LoRAInjectError, match=r"(q_proj|linear_1): .*reads no token ids"):
            model(**inputs)
        model(input_ids=inputs["input_ids"][:, -2:])  # where no image comes in


def test_parts_with_rows_of_their_own_get_a_block_each():
    model, inputs = vision_language(["q_proj", "lm_head"]), two_images_in_the_first_row()
    inputs["pixel_values"].requires_grad_()
    expected = []
    for name in ("fr", "de"):
        use(model, name)
        expected.append(model(**inputs).logits)
    vision = next(m for n, m in model.named_modules() if n.endswith("vision_tower"))
    text = next(m for n, m in model.named_modules() if n.endswith("language_model"))
    with (
        per_row(vision, ["fr", "fr"]),
        per_row(text, ["fr", "de"]),
        per_row(model.lm_head, ["fr", "de"]),
    ):
        got = model(**inputs).logits
    torch.testing.assert_close(got, torch.stack([expected[0][0], expected[1][1]]))


def generated(model, names, **options):
    """What beam search scores with an adapter for each of these."""
    with per_row(model, names):
        return model.generate(
            max_new_tokens=3, num_beams=2, do_sample=False, output_scores=True,
            return_dict_in_generate=True, pad_token_id=0, **options,
        )  # fmt: skip


def t5():
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return adapted(tf.T5ForConditionalGeneration(config), ["q", "v"])


def llama():
    torch.manual_seed(0)
    return adapted(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), ["q_proj", "v_proj"])


@pytest.mark.parametrize("build", [t5, llama])
def test_beams_have_the_adapter_of_their_row(build):
    model, ids = build(), torch.randint(3, 50, (2, 5))
    got = generated(model, ["fr", "de"], input_ids=ids)
    for row, name in enumerate(["fr", "de"]):
        use(model, name)
        alone = model.generate(
            ids[row : row + 1], max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0
        )
        assert torch.equal(got.sequences[row, : alone.shape[1]], alone[0])


def test_a_name_for_each_beam_is_as_good_where_all_layers_see_them():
    model, ids = llama(), torch.randint(3, 50, (2, 5))
    two = generated(model, ["fr", "de"], input_ids=ids)
    four = generated(model, ["fr", "fr", "de", "de"], input_ids=ids)
    assert torch.equal(two.sequences_scores, four.sequences_scores)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, mask=None):
        return self.second(self.first(x).flatten(0, -2))


def test_entries_in_another_order_are_refused_and_so_are_those_that_do_not_tell():
    model, x = adapted(Net(), ["first"]), torch.randn(2, 4).double()
    before = snapshot(model)
    with per_row(model, ["fr", "de"]):
        both = model(x)
        in_place = model(x.repeat_interleave(3, dim=0))
        assert torch.equal(in_place[::3], both)
        for other in (x.repeat(3, 1), x[:1].repeat(4, 1), torch.randn(6, 4).double()):
            for mask in (None, x):
                with pytest.raises(LoRAInjectError, match="first: its input has"):
                    model(other, mask)
        assert torch.equal(model(x), both)
        model(x.repeat_interleave(3, dim=0), mask=torch.zeros(6).double())
        with pytest.raises(LoRAInjectError, match="first: its input has"):
            model(x.repeat_interleave(3, dim=0), torch.arange(6).double())
    assert changed_parts(before, snapshot(model)) == []


def test_what_is_no_row_any_more_inside_of_the_model_is_refused():
    model = adapted(Net(), ["first", "second"])
    with (
        per_row(model, ["fr", "de"]),
        pytest.raises(LoRAInjectError, match="second: its input has 6"),
    ):
        model(torch.randn(2, 3, 4).double())
