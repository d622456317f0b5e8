"""The weights that a model had before it was quantized, read one tensor at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import ArgumentError, FormatError

_FLOATING = ("F64", "F32", "F16", "BF16")


class Original:
    """Tensors by name, in safetensors files, a state dict or a module.

    Args:
        source: the path of a file or of a directory of them, a mapping of tensors, or a module.

    Raises:
        ArgumentError: it is something else.
        FormatError: a file is not there or cannot be read.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.files: dict[str, Path] = {}
        self.held: Mapping[str, Tensor] = {}
        if isinstance(source, nn.Module):
            self.held = dict(source.named_parameters(remove_duplicate=False))
        elif isinstance(source, Mapping):
            self.held = source
        elif isinstance(source, str | os.PathLike):
            self.files = {key: file for file in _files(Path(source)) for key in _names(file)}
        elif source is not None:
            raise ArgumentError(
                "original must be a path of safetensors files, a state dict or a module, not "
                f"{type(source).__name__}."
            )

    def __reduce__(self) -> Any:
        # Weights do not go into a pickled model; a path does.
        return Original, (self.source if self.files else None,)

    def __deepcopy__(self, memo: Any) -> "Original":
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.held

    def tensor(self, name: str) -> Tensor:
        """A tensor, from a file on the CPU."""
        if name not in self.files:
            return self.held[name].detach()
        import safetensors

        with safetensors.safe_open(self.files[name], framework="pt", device="cpu") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Its shape, without reading it; None where it is none of 16 bits or more."""
        if name not in self.files:
            held = self.held[name]
            floating = held.is_floating_point() and held.dtype.itemsize > 1
            return tuple(held.shape) if floating else None
        import safetensors

        with safetensors.safe_open(self.files[name], framework="pt", device="cpu") as file:
            found = file.get_slice(name)
            return tuple(found.get_shape()) if found.get_dtype() in _FLOATING else None


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint: those that its index names, or all that there are."""
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    for index in sorted(path.glob("*.safetensors.index.json"))[:1]:
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{index} is no index of safetensors files: {error!r}.") from error
        found = [path / Path(str(name)).name for name in sorted(named)]
    if not found:
        raise FormatError(f"there are no safetensors files at {path}.")
    return found


def _names(file: Path) -> list[str]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            return list(opened.keys())
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"{file} is no whole safetensors file: {error}.") from error
