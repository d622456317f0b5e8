"""``nn.Embedding``: the id picks a column of A, B maps it to the embedding's width."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.arithmetic.embedding import (
    divide_gradient_by_frequency,
    embedding_down,
    looked_up,
)
from lora_inject.arithmetic.linear import linear_up
from lora_inject.kinds.base import Form, Kind, Way, is_plain, linear_spec, overrides_forward
from lora_inject.kinds.trials import writing_refusal
from lora_inject.kinds.weight_reads import calls_super, reads_own_weight
from lora_inject.own import own_class
from lora_inject.settings import Settings
from lora_inject.sharding import replicated
from lora_inject.variants import Spec


class EmbeddingKind(Kind):
    """``y = W[ids]`` with W of shape (rows, width); A is (r, rows), B is (width, r).

    The branch is added to what ``nn.Embedding.forward`` returns, so that subclasses that scale it
    (Gemma) or shift the ids before it (OPT's positions) treat the adapter as they treat the weight.
    """

    name = "Embedding"
    transposes = True
    zero = "A"
    has_rows = True
    below = nn.Embedding

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.Embedding``."""
        return isinstance(module, nn.Embedding)

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair."""
        assert isinstance(module, nn.Embedding)
        rows, width = module.num_embeddings, module.embedding_dim
        weight = module._parameters.get("weight")
        if weight is not None and is_plain(weight) and weight.dim() == 2:
            rows, width = weight.shape  # which may have been cut since
        return (linear_spec("weight", rows, width, settings.r),)

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """``max_norm`` writes to the weight; a forward that bypasses its parent's needs how=."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return (
                "max_norm rescales the frozen weight in every forward pass. Set max_norm to None "
                "or exclude the layer."
            )
        if way == "weight" and module.sparse:
            return "sparse=True has no gradient through a computed weight. Adapt it as it is."
        if way == "branch" and overrides_forward(module, nn.Embedding):
            cls = own_class(module)
            if reads_own_weight(cls, nn.Embedding) or not calls_super(cls, nn.Embedding):
                return (
                    f"{cls.__name__} has a forward that does not always call that of "
                    'nn.Embedding, where the adapter is added. Use how="weight", which computes '
                    "the whole table."
                )
        own_forward = way == "weight" and overrides_forward(module, nn.Embedding)
        return writing_refusal(module, _ids) if own_forward else None

    def initial(self, spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A zero, B normal, as in loralib: an id that training never saw keeps a delta of zero."""
        return initial.zeros(spec.A_shape), initial.normal(spec.B_shape, generator)

    def placements(self, weight: Tensor, spec: Spec) -> tuple[list[Any], list[Any]]:
        """A whole: of a sharded one torch would look up ids that B cannot be applied to."""
        A, B = super().placements(weight, spec)
        return replicated(A), B

    def form(self, layer: nn.Module) -> Form:
        """As PEFT has it."""
        return "embedding"

    def down(self, layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, dropout: float) -> Tensor:
        """``A[:, ids]`` with the gradient options of the layer."""
        assert isinstance(layer, nn.Embedding)
        return embedding_down(x, A, dropout, padding_idx=layer.padding_idx, sparse=layer.sparse)

    def up(self, layer: nn.Module, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``B h``."""
        assert isinstance(layer, nn.Embedding)
        delta = linear_up(h, B)
        return divide_gradient_by_frequency(delta, x) if layer.scale_grad_by_freq else delta

    def add_rows(
        self, layer: nn.Module, x: Tensor, y: Tensor, index: Tensor, rows: Tensor
    ) -> Tensor:
        """To what was looked up for these ids."""
        assert isinstance(layer, nn.Embedding)
        delta = looked_up(x, index, rows, layer.padding_idx).to(y.dtype)
        return y + (divide_gradient_by_frequency(delta, x) if layer.scale_grad_by_freq else delta)


def _ids(weight: Tensor) -> Tensor:
    return torch.arange(min(2, len(weight)), device=weight.device)
