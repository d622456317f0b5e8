"""Modules that read the weight of a child without calling it, so that a branch would be silent."""

from torch import nn

# Read by name: importing transformers for this would be heavy. Mamba's scan takes these weights as
# arguments; which of them depends on the kernel that is installed.
_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")


def is_read_by(parent: nn.Module, name: str) -> bool:
    """Whether the parent reads the weight of its child of this name.

    ``nn.MultiheadAttention`` does so always, ``nn.TransformerEncoderLayer`` on its inference path.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return name == "out_proj"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return name in ("linear1", "linear2")
    return type(parent).__name__.endswith(("MambaMixer", "Mamba2Mixer")) and name in _MAMBA
