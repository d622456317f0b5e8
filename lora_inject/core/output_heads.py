"""Which Linear layers are output heads: what ``"all-linear"`` leaves alone.

A head is, in this order of evidence: what the model itself calls its output embeddings (the
transformers convention), a layer whose weight is the weight of an embedding, or a layer under one
of the usual names that stands outside the repeated blocks.
"""

from collections.abc import Iterable

from torch import nn

from lora_inject.core.patterns import NamedModule

# Names that transformers, timm and torchvision give to the last layer or the module that holds it.
HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "classifier", "score", "qa_outputs", "output_layer", "embed_out"}
    | {"cls", "multiple_choice_head"}
)
OF_LANGUAGE_MODELS = frozenset({"lm_head", "embed_out"})  # of these, which nobody makes anew
BY_NAME = "output head (by its name)"


def find_heads(modules: Iterable[NamedModule]) -> dict[nn.Module, str]:
    """The output heads of a model, each with the reason why it is taken for one."""
    modules = list(modules)
    weights = {named.module: _own_weight(named.module) for named in modules}
    embeddings = {id(w) for m, w in weights.items() if isinstance(m, nn.Embedding)}
    heads: dict[nn.Module, str] = {}
    for named in modules:
        if (head := _declared_head(named.module)) is not None:
            heads.setdefault(head, "output head (get_output_embeddings)")
        if isinstance(named.module, nn.Embedding):
            continue
        if weights[named.module] is not None and id(weights[named.module]) in embeddings:
            heads.setdefault(named.module, "output head (shares its weight with an embedding)")
        elif any(_named_like_a_head(path) for path in named.paths):
            heads.setdefault(named.module, BY_NAME)
    return heads


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    return dict(module._parameters.items()).get("weight")


def _declared_head(module: nn.Module) -> nn.Module | None:
    ask = getattr(module, "get_output_embeddings", None)
    try:
        head = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError, TypeError):
        return None  # transformers' base models have the method and no head, others mean another
    return head if isinstance(head, nn.Module) else None


def _named_like_a_head(path: str) -> bool:
    for component in path.split("."):
        if component.isdecimal():
            return False
        if component in HEAD_NAMES:
            return True
    return False
