"""PEFT's word for what a model does, by which ``AutoPeftModel`` chooses its class."""

from collections.abc import Iterable

from torch import nn

from lora_inject.compat.marks import is_encoder_decoder
from lora_inject.core.paths import bare

# By the end of the class's name: the word, and the heads that PEFT then trains in full. Without
# one of them in the adapter the word is left out: PEFT would look for its weights in the file.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def task_of(model: nn.Module, train_also: Iterable[str]) -> str:
    """The word for a model, and "" where there is none.

    Args:
        model: the model, or a wrapper that holds it.
        train_also: the paths of the modules that trained in full.
    """
    own = bare(model)
    encodes = is_encoder_decoder(own)
    trained = {path.rpartition(".")[2] for path in train_also}
    for end, (word, heads) in _TASKS.items():
        if type(own).__name__.endswith(end):
            fits = encodes if word == "SEQ_2_SEQ_LM" else not heads or trained & set(heads)
            return word if fits else ""
    return ""
