"""``nn.Embedding``: the id picks a column of A, B maps it to the embedding's width."""

import torch
from torch import Tensor, nn

from lora_inject import initial
from lora_inject.functional import embedding_delta
from lora_inject.kinds.base import Kind
from lora_inject.settings import Settings


class EmbeddingKind(Kind):
    """``y = W[ids]`` with W of shape (rows, width); A is (r, rows), B is (width, r)."""

    name = "Embedding"

    def matches(self, module: nn.Module) -> bool:
        """Instances of ``nn.Embedding``."""
        return isinstance(module, nn.Embedding)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(rows, width)."""
        assert isinstance(module, nn.Embedding)
        return module.num_embeddings, module.embedding_dim

    def refusal(self, module: nn.Module) -> str | None:
        """``max_norm`` writes to the weight in forward; other forwards may do anything with it."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return (
                "max_norm rescales the frozen weight in every forward pass. Set max_norm to None "
                "or exclude the layer."
            )
        if type(module).forward is not nn.Embedding.forward:
            return (
                f"{type(module).__name__} has a forward of its own, and what that does to the "
                "weight would not be done to the adapter. Exclude the layer or register a kind "
                "for it."
            )
        return None

    def initial(
        self, features: tuple[int, int], r: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A zero, B normal, as in loralib: an id that training never saw keeps a delta of zero."""
        A_shape, B_shape = self.shapes(features, r)
        return initial.zeros(A_shape), initial.normal(B_shape, generator)

    def delta(
        self, layer: nn.Module, x: Tensor, A: Tensor, B: Tensor, settings: Settings, dropout: float
    ) -> Tensor:
        """``scaling * B A[:, ids]`` with the gradient options of the layer."""
        assert isinstance(layer, nn.Embedding)
        return embedding_delta(
            x,
            A,
            B,
            settings.scaling,
            dropout,
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
        )
