"""What a file adds to tensors of the base, of which only the model tells the values."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_inject.core.paths import bare_key
from lora_inject.errors import FormatError
from lora_inject.files.laid_out import LaidOutTensor
from lora_inject.own import own_tensor
from lora_inject.sharding import whole


def sums(
    added: Mapping[str, Tensor], modules: Mapping[str, nn.Module], given: Mapping[str, Tensor]
) -> Iterator[LaidOutTensor]:
    """Each tensor with what is added to it.

    Args:
        added: what is added, by the names in the file.
        modules: those of the model by path.
        given: values that the file has for the tensors themselves, by key.

    Raises:
        FormatError: a layer has no such tensor.
    """
    for name, delta in added.items():
        owner, _, last = name.rpartition(".")
        path = bare_key(owner, modules)
        key = f"{path}.{last}".lstrip(".")
        value = _with(given.get(key), delta, modules[path], key)
        yield LaidOutTensor(path, modules[path], last, value, name)


def _with(given: Tensor | None, added: Tensor, module: nn.Module, key: str) -> Tensor:
    """The value of a bias with what a file adds to it.

    Raises:
        FormatError: the layer has none.
    """
    own = own_tensor(module, key.rpartition(".")[2])
    if own is None:
        raise FormatError(
            "the file adds to its bias (lora_bias), and it has none.",
            path=key.rpartition(".")[0],
            remedy="Give it one of zeros before loading: layer.bias = nn.Parameter(torch.zeros("
            f"{added.shape[0]})).",
        )
    value = whole(own.detach()) if given is None else given
    return value.to(torch.promote_types(value.dtype, added.dtype)) + added.to(value.device)
