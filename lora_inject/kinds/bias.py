"""Which parameters are biases."""

from torch import nn
from torch.nn.parameter import is_lazy


def is_bias(owner: nn.Module, name: str) -> bool:
    """Whether a module uses its parameter of this name as a bias.

    ``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``q_bias``: the owner's own name for it decides, so
    that ``relative_attention_bias.weight`` is a weight. A matrix is one only beside the weight it
    belongs to (``gate_up_proj_bias`` of fused experts) or in ``nn.MultiheadAttention``, ``bias_k``.
    """
    if not (name == "bias" or name.startswith("bias_") or name.endswith("_bias")):
        return False
    parameter = owner._parameters[name]
    if parameter is None or is_lazy(parameter) or parameter.dim() <= 1:
        return True
    return name.removesuffix("_bias") in owner._parameters or (
        isinstance(owner, nn.MultiheadAttention)
    )
