"""Names of modules without those that wrappers put in: what a file calls them."""

from collections.abc import Container, Mapping

from torch import nn

from lora_inject.compat.marks import WRAPPED_INFIXES, WRAPPED_PREFIXES, WRAPPERS


def bare(model: nn.Module) -> nn.Module:
    """The model inside of wrappers."""
    while (name := WRAPPERS.get(type(model).__name__)) in model._modules:
        inside = model._modules[str(name)]
        if inside is None:
            break
        model = inside
    return model


def bare_modules(by_path: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules by every path that they have, without the names that wrappers put in."""
    modules: dict[str, nn.Module] = {}
    shown: dict[str, tuple[str, str | None]] = {}  # path without wrappers, name of what is wrapped
    for path, module in by_path.items():
        parent, _, name = path.rpartition(".")
        above, inside = shown[parent] if path else ("", "")
        own = above if name == inside else f"{above}.{name}".lstrip(".")
        shown[path] = own, WRAPPERS.get(type(module).__name__)
        modules[own] = module  # of a wrapper and what it wraps, the latter
    return modules


def first_paths(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """The first path of every module."""
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    return paths


def outputs(module: nn.Module) -> int:
    """How many features or channels go out of a layer; 0 where it does not say."""
    own = module.__dict__.get("out_features", module.__dict__.get("out_channels", 0))
    return own if isinstance(own, int) else 0


def without_infixes(key: str) -> str:
    """A key without the names that wrappers put between those of the model."""
    for infix in WRAPPED_INFIXES:
        key = key.replace(infix, "")
    return key


def bare_key(key: str, known: Container[str]) -> str:
    """A key without the names of wrappers, if only so it is one of those known."""
    if key in known:
        return key
    candidate = without_infixes(key)
    while candidate not in known:
        prefix = next((p for p in WRAPPED_PREFIXES if candidate.startswith(p)), None)
        if prefix is None:
            return key
        candidate = candidate.removeprefix(prefix)
    return candidate
