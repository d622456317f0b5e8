"""How PEFT wraps the parameters of a module one around the other, and what its keys call them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def nested_parameters(
    config: Mapping[str, Any], found: Iterable[str], modules: Mapping[str, nn.Module] | None
) -> dict[str, tuple[nn.Module, str, str]]:
    """(module, its path, parameter) of each fused parameter, by the path in the file.

    PEFT wraps the parameters of a module one around the other, in their order in the module, so
    that the last one is the outermost.
    """
    wanted, paths = tuple(config.get("target_parameters") or ()), list(found)
    if not wanted or modules is None:
        return {}
    result = {}
    for path in {unwrapped(name) for name in paths}:
        module = modules.get(path)
        if module is None:
            continue
        own = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if any(f"{path}.{name}" == w or f"{path}.{name}".endswith("." + w) for w in wanted)
        ]
        for depth, name in enumerate(reversed(own)):
            result[path + ".base_layer" * depth] = (module, path, name)
    return result


def unwrapped(path: str) -> str:
    """A path in a file without the wrappers of parameters."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
