"""What a file holds, without the file: tensors by a format's keys, and the config beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

IN_MEMORY = Path("the state dict")  # in place of a file's name, in errors


class AdapterState(dict[str, Tensor]):
    """The tensors of an adapter by the keys of a format, as a dict.

    Attributes:
        format: the format.
        config: what the format says of them: PEFT's config for "peft" and "diffusers".
        metadata: what stands in the metadata of a file, and other libraries ignore.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        format: str,
        config: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        super().__init__(tensors)
        self.format, self.config, self.metadata = format, dict(config), dict(metadata)

    def __reduce__(self) -> Any:
        return AdapterState, (dict(self), self.format, self.config, self.metadata)
