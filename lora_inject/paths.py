"""Names of modules without those that wrappers put in: what a file calls them."""

from collections.abc import Container, Mapping

from torch import nn

# Wrappers of a whole model or of a block, which put their own name into every path below them.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
_PREFIXES = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def bare(model: nn.Module) -> nn.Module:
    """The model inside of wrappers."""
    while (name := _WRAPPERS.get(type(model).__name__)) in model._modules:
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
        shown[path] = own, _WRAPPERS.get(type(module).__name__)
        modules[own] = module  # of a wrapper and what it wraps, the latter
    return modules


def first_paths(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """The first path of every module."""
    paths: dict[nn.Module, str] = {}
    for path, module in modules.items():
        paths.setdefault(module, path)
    return paths


def bare_key(key: str, known: Container[str]) -> str:
    """A key without the names of wrappers, if only so it is one of those known."""
    if key in known:
        return key
    candidate = key
    for infix in _INFIXES:
        candidate = candidate.replace(infix, "")
    while candidate not in known:
        prefix = next((p for p in _PREFIXES if candidate.startswith(p)), None)
        if prefix is None:
            return key
        candidate = candidate.removeprefix(prefix)
    return candidate
