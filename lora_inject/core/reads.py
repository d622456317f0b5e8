"""Which targets have a weight that a module above them reads, or writes to, while it runs."""

from collections.abc import Mapping
from functools import cached_property

from lora_inject.compat.marks import never_rescales
from lora_inject.core.index import Index
from lora_inject.core.matcher import Target
from lora_inject.kinds.bytecode import Read, is_meant
from lora_inject.kinds.weight_reads import weights_read_below, weights_written_below
from lora_inject.own import own_class

By = Mapping[str, frozenset[Read]]  # by the path of a module: what inside of it


class Reads:
    """What the modules of a model read and write of each other's weights, by their code.

    Args:
        index: the model.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def is_read(self, target: Target) -> bool:
        """Whether a module above the target reads its weight."""
        return bool(self._readers) and _of_whom(target, self._readers) is not None

    def writer(self, target: Target) -> str | None:
        """The class of a module above that writes to the target's weight; None where none does."""
        path = _of_whom(target, self._writers) if self._writers else None
        return None if path is None else own_class(self._index.by_path[path]).__name__

    @cached_property
    def _readers(self) -> By:
        classes = {own_class(module) for module in self._index.modules}
        reads = {cls: read for cls in classes if (read := weights_read_below(cls))}
        paths = self._index.by_path.items() if reads else ()
        return {p: reads[own_class(m)] for p, m in paths if own_class(m) in reads}

    @cached_property
    def _writers(self) -> By:
        found = {path: self._index.by_path[path] for path in self._readers}
        able = {path: own_class(m) for path, m in found.items() if not never_rescales(m)}
        return {p: writes for p, cls in able.items() if (writes := weights_written_below(cls))}


def _of_whom(target: Target, known: By) -> str | None:
    """The path of the first module of these that may mean the target."""
    for path in target.paths:
        components = tuple(path.split("."))
        for depth in range(len(components)):
            above = ".".join(components[:depth])
            if any(is_meant(read, components[depth:]) for read in known.get(above, ())):
                return above
    return None
