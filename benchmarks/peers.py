"""The models that are measured, and what others make of them: PEFT, and the plain composition."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_of_48_layers() -> Any:
    """A Llama with 336 linear layers, small ones, for rows in which nothing is multiplied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=48, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def small_llama(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of four blocks, in which products are what takes time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


class LlamaBlock(nn.Module):
    """One decoder block of a Llama, with the rotary embedding of all its positions.

    Args:
        config: a LlamaConfig.
        tokens: how many an input has.
        device: where it is made.
        dtype: of its weights.
    """

    def __init__(self, config: Any, tokens: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama

        with torch.device(device):
            self.block = llama.LlamaDecoderLayer(config, 0).to(dtype)
            positions = torch.arange(tokens)[None]
            cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.hidden_size: int = config.hidden_size

    def forward(self, x: Tensor) -> Tensor:
        """From (1, tokens, hidden) to the same shape."""
        found = self.block(x, position_embeddings=(self.cos, self.sin))
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return y


class EagerLoRALinear(nn.Module):
    """LoRA as torchtune and others compose it: ``W x + alpha / r * B(A(dropout(x)))``."""

    def __init__(self, base: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        self.base = base
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Linear(base.in_features, r, bias=False, **factory)
        self.lora_b = nn.Linear(r, base.out_features, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """The layer and the adapter."""
        y = F.linear(x, self.base.weight, self.base.bias)
        return y + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))


class EagerExperts(nn.Module):
    """LoRA on fused experts as a plain composition of grouped products: ``W x + B(A x)``.

    Shapes: T tokens, K experts of each, N = T K rows in the order of their experts, E experts.

    Args:
        experts: with gate_up_proj (E, 2 M, H) and down_proj (E, H, M), and ``act_fn``.
        index: (T, K), the experts of each token.
        weights: (T, K), how much of each.
        r: the rank.
    """

    def __init__(self, experts: Any, index: Tensor, weights: Tensor, r: int) -> None:
        super().__init__()
        self.experts, self.r = experts, r
        self.register_buffer("weights", weights)
        expert_N, order_N = index.flatten().sort()
        ids = torch.arange(experts.gate_up_proj.shape[0], device=index.device)
        ends_E = torch.searchsorted(expert_N, ids, right=True).int()
        for name, value in (("order", order_N), ("ends", ends_E), ("back", order_N.argsort())):
            self.register_buffer(name, value)
        for name, W in list(experts.named_parameters()):
            A = torch.randn_like(W[:, :r]) / W.shape[-1] ** 0.5
            B = 0.02 * torch.randn_like(W[:, :, :1]).expand(-1, -1, r).contiguous()
            self.register_parameter(f"{name}_lora_a", nn.Parameter(A))
            self.register_parameter(f"{name}_lora_b", nn.Parameter(B))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what each token's experts make of it."""
        top = self.weights.shape[1]
        gate, up = self._adapted(x[self.order // top], "gate_up_proj").chunk(2, -1)
        y_NH = self._adapted(self.experts.act_fn(gate) * up, "down_proj")
        y_TKH = y_NH[self.back].view(-1, top, x.shape[-1])
        return (y_TKH * self.weights.unsqueeze(-1)).sum(1)

    def _adapted(self, x_N: Tensor, name: str) -> Tensor:
        def product(x: Tensor, M: Tensor) -> Tensor:
            return F.grouped_mm(x, M.mT, offs=self.ends)

        A, B = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
        return product(x_N, getattr(self.experts, name)) + product(product(x_N, A), B)


def eager(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    """A copy of a model with eager LoRA layers in place of the Linear layers of these names."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            model.set_submodule(path, EagerLoRALinear(module, r, dropout))
    return model


def with_peft(
    model: nn.Module,
    names: list[str],
    r: int,
    dropout: float = 0.0,
    parameters: list[str] | None = None,
    **options: Any,
) -> Any:
    """A copy of a model with PEFT's adapters, which start with random A and B.

    Args:
        model: any model.
        names: its modules to adapt.
        r: the rank.
        dropout: of the adapters.
        parameters: its parameters to adapt, for fused experts.
        options: of ``get_peft_model``.
    """
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=r, lora_dropout=dropout, target_modules=names, init_lora_weights=False,
        target_parameters=parameters,
    )  # fmt: skip
    return peft.get_peft_model(copy.deepcopy(model), config, **options)


def randomize(model: nn.Module) -> nn.Module:
    """Give every B a value, so that nothing is multiplied by zeros."""
    for name, parameter in model.named_parameters():
        if "lora_b" in name.lower():
            with torch.no_grad():
                parameter.normal_(std=0.02)
    return model
