"""Between a model and an adapter's data: what is saved of it, and how it is put in place.

Everything is found through the states of modules, never by searching names, so that nothing of an
adapter can be left out. Paths are those of the bare model: what wrappers put in front is left out.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lora_inject.changes.edits import Edit, filling, run
from lora_inject.compat.marks import is_fully_sharded
from lora_inject.core.company import company
from lora_inject.core.look import Look
from lora_inject.core.paths import bare, bare_key, bare_modules, first_paths, outputs
from lora_inject.core.state_parts import Trained
from lora_inject.core.travelling import SettingsByKey, described
from lora_inject.errors import ArgumentError, FormatError, LoRAInjectError
from lora_inject.files.fingerprint import fingerprints
from lora_inject.files.fit_checks import (
    is_for,
    not_finite,
    raise_problems,
    require_fit,
    require_usable,
)
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import told_layout
from lora_inject.files.rows import refused_rows, stored_rows
from lora_inject.files.stored_pair import StoredPair, require_agreement
from lora_inject.files.task import task_of
from lora_inject.files.token_rows import token_tables
from lora_inject.files.untouched import untouched
from lora_inject.files.which_adapter import adapter_name
from lora_inject.kinds.parameter import ParameterKind
from lora_inject.settings import BiasMode
from lora_inject.sharding import is_placeholder, require_whole, reshard, whole
from lora_inject.variants import OTHER, Rows


class Stored:
    """One adapter of a model as what is saved of it.

    Args:
        model: an adapted model, or a wrapper that holds it.
        adapter: its name; None for the only one, or the only one in use.
        look: the model, where it has been looked at.
    """

    def __init__(self, model: nn.Module, adapter: str | None, look: Look | None = None) -> None:
        look = look or Look(model)
        reshard(look.index.modules)
        self.model, self.look = model, look
        look.require_adapters()
        self.name = adapter_name(look, adapter)
        look.require_whole([self.name])
        look.require_one_mode(self.name)
        self.modules = bare_modules(look.index.by_path)
        self.paths = first_paths(self.modules)
        self.real_prefixes = [name for name in ("module", "base_model") if name in self.modules]
        look.require_awake()
        self.pairs = [
            StoredPair(self.paths[layer], layer, own, pair)
            for layer, own in look.adapters
            if own.name == self.name
            for pair in own.pairs
        ]
        for held in self.pairs:
            if held.adapter.follows:
                look.leader(held.layer, held.adapter)

    @property
    def bias(self) -> BiasMode:
        """The bias mode that the adapter was trained with."""
        return self.look.known[self.name]

    @functools.cached_property
    def trained(self) -> dict[str, tuple[nn.Module, Trained]]:
        """What it trained in place, by the name in the bare model."""
        return {
            f"{self.paths[module]}.{trained.name}".lstrip("."): (module, trained)
            for module, trained in self.look.trained
            if trained.name not in module._non_persistent_buffers_set
            if self.look.tensor(module, trained, self.name) is not None
        }

    def check_bias(self, bias: Any) -> None:
        """Refuse a bias mode other than the one it was trained with."""
        if bias != self.bias:
            lost = sorted(self.trained)
            would = f"{len(lost)} trained tensors, such as {lost[0]}, would be lost" if lost else (
                "no bias was trained"
            )  # fmt: skip
            raise ArgumentError(
                f"bias={bias!r}, but {self.name!r} was trained with bias={self.bias!r}: {would}.",
                remedy="Leave bias out to save what was trained.",
            )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter by its key; a tied pair once, where it leads."""
        tensors: dict[str, Tensor] = {}
        for held in self.pairs:
            if not held.adapter.follows:
                shapes, own = held.variant.shapes(held.spec), held.tensors
                for role, key in held.keys.items():
                    require_whole(key, own[role], shapes[role])
                    tensors[key] = own[role]
        for key, (module, place) in self.trained.items():
            tensor = self.look.tensor(module, place, self.name)
            assert tensor is not None
            if is_placeholder(tensor) or is_fully_sharded(module):
                require_whole(key, tensor, None if place.former is None else place.former.shape)
            tensors[key] = tensor
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise LoRAInjectError(f"{key} is on the meta device and has no values.")
        return tensors

    def tied(self) -> dict[str, Tensor]:
        """The pairs of places that share the pair of another: the same tensors once more."""
        found: dict[str, Tensor] = {}
        for held in self.pairs:
            if held.adapter.follows:
                own = held.tensors
                found |= {key: own[role] for role, key in held.keys.items()}
        return found

    def settings(self) -> SettingsByKey:
        """What the meaning of its tensors depends on, by the key of each A."""
        pairs = ((next(iter(held.keys.values())), held) for held in self.pairs)
        return {key: described(held.adapter, held.pair) for key, held in pairs}

    def data(self) -> AdapterData:
        """The adapter apart from the model."""
        tensors = self.tensors()
        trained = {key: tensors[key] for key in self.trained}
        tops = [m for m, s in self.look.states.items() if self.name in s.reach.tops]
        config = getattr(bare(self.model), "config", None)
        name = getattr(config, "_name_or_path", "") or getattr(self.model, "name_or_path", "")
        ties = bool(getattr(config, "tie_word_embeddings", False))
        kind = type(bare(self.model)).__name__
        weights = {
            f"{held.path}.{held.spec.weight}".lstrip("."): held.adapter.kind.weight(
                held.layer, held.spec.weight
            )
            for held in self.pairs
        }
        others = [held for held in self.in_order() if not isinstance(held.variant, Rows)]
        rows = token_tables(self.look, self.paths, {*trained, *weights})
        return AdapterData(
            pairs=tuple(map(self._pair, others)),
            tensors={key: whole(t.detach()) for key, t in trained.items()},
            bias=self.bias,
            train_also=tuple(self.paths[module] for module in tops),
            targets=tuple(dict.fromkeys(held.adapter.pattern for held in others)),
            base=fingerprints(weights),
            rows=fingerprints(rows),
            untouched=untouched(self.look, self.paths, {*trained, *weights, *rows}),
            base_name=name if isinstance(name, str) else "",
            model_class=kind,
            task=task_of(self.model, (self.paths[module] for module in tops)),
            modules={path: outputs(module) for module, path in self.paths.items() if path},
            beside=tuple(sorted(company(self.look).get(self.name, ()))),
            facts={
                "refused": self._in_several_places() | refused_rows(self.look, self.pairs, ties)
            },
            tables=stored_rows(self.in_order()),
            said=json.loads(self.look.said(self.name) or "{}"),
            dtype="base" if self._follows_base() else "",
        )

    def _follows_base(self) -> bool:
        """Whether A and B have the 16 bits of their weights, as no default of inject has it."""
        weights = [h.adapter.kind.weight(h.layer, h.spec.weight) for h in self.pairs]
        pairs = zip(self.pairs, weights, strict=True)
        firsts = [(next(iter(held.tensors.values())), weight) for held, weight in pairs]
        return all(w.dtype is first.dtype and w.dtype.itemsize == 2 for first, w in firsts)

    def in_order(self) -> list[StoredPair]:
        """The pairs, those of one module in the order of its parameters."""
        first: dict[str, int] = {}
        for i, held in enumerate(self.pairs):
            first.setdefault(held.path, i)

        def position(held: StoredPair) -> tuple[int, int]:
            names = list(held.layer._parameters)
            weight = held.spec.weight
            return first[held.path], names.index(weight) if weight in names else 0

        return sorted(self.pairs, key=position)

    def _in_several_places(self) -> dict[str, str]:
        """What other libraries would take apart: shared layers, and tied tensors that train."""
        paths = Counter(self.modules.values())
        shared = {held.path for held in self.pairs if paths[held.layer] > 1}
        tied = {key for key, (_, t) in self.trained.items() if t.places > 1 and t.owners[self.name]}
        why = "stands at several paths of the model, of which it would adapt one alone"
        return dict.fromkeys(shared, why) | dict.fromkeys(
            tied, "is tied to another, from which it would be untied"
        )

    def _pair(self, held: StoredPair) -> PairData:
        spec, settings, kind = held.spec, held.adapter.settings, held.adapter.kind
        variant, rule = settings.variant, settings.variant.scaling
        own = held.oriented({role: whole(t.detach()) for role, t in held.tensors.items()})
        A, B = own["A"], own["B"]
        if variant.offset:  # any reader's LoRA of twice the rank
            A, B = kind.from_matrices(held.layer, *variant.with_start(kind, held.layer, own))
        rank = spec.rank * (2 if variant.offset else 1)
        fixed, turned = variant.fixed or "", spec.swapped
        layout = "in_out" if kind.transposes else ""
        if isinstance(kind, ParameterKind):
            layout = told_layout(held.layer, kind.weight(held.layer, spec.weight))
            if layout != kind.layout:  # the same update, written as others read it
                A, B, turned = B.transpose(-2, -1), A.transpose(-2, -1), not turned
        above = self.modules.get(held.path.rpartition(".")[0])
        return PairData(
            path=held.path,
            A=A,
            B=B,
            alpha=settings.alpha if rank == settings.r else rule.alpha(settings.scaling, rank),
            rule=rule.name,
            fixed=OTHER[fixed] if turned else fixed,
            variant=variant.name,
            others={r: own[r] for r in variant.more if r in own and r not in variant.derived},
            **held.untold,
            start=settings.start.word if variant.offset else "",
            form=kind.form(held.layer),
            weight=spec.weight,
            part=spec.part,
            span=(spec.start, cast(Any, kind).features(held.layer)[1]) if spec.part else (0, 0),
            dropout=settings.dropout,
            drops=settings.drops,
            layout=layout,
            in_attention=isinstance(above, nn.MultiheadAttention) and above.out_proj is held.layer,
        )

    def fill(self, state: Mapping[str, Tensor], scalings: Mapping[str, float]) -> None:
        """Copy values into the adapter's tensors, all or none.

        Raises:
            FormatError: as ``filled``.
        """
        run(self.filled(state, scalings))

    def filled(self, state: Mapping[str, Tensor], scalings: Mapping[str, float]) -> list[Edit]:
        """What copies values into the adapter's tensors.

        Args:
            state: the values by loralib's keys.
            scalings: of pairs whose values were made for another scaling than the model's, by key.

        Raises:
            FormatError: something is missing, unexpected, of another shape or not finite.
        """
        own, tied = self.tensors(), self.tied()
        known = own.keys() | tied.keys()
        given: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for key, value in state.items():
            # A prefix that is the name of a real module here is none of a wrapper's.
            real = any(key.startswith(f"{path}.") for path in self.real_prefixes)
            name = key if real else bare_key(key, known)
            if (first := names.setdefault(name, key)) != key:
                raise FormatError(
                    f"two of the keys mean {name}: {first} and {key}.", remedy="Nothing was loaded."
                )
            given[name] = whole(value) if isinstance(value, Tensor) else value
        shared = {key: given.pop(key) for key in tied if key in given}
        for held in self.pairs:  # what a file leaves out is the base's, and stays
            for role in held.variant.derived:
                given.setdefault(held.keys[role], whole(held.tensors[role].detach()))
        ready = dict(given)
        for held in self.pairs:
            values = {role: given.get(key) for role, key in held.keys.items()}
            usable = {r: t for r, t in values.items() if t is not None and is_for(t, None)}
            if not held.adapter.follows and len(usable) == len(values):
                scaling = scalings.get(held.key, held.adapter.settings.scaling)
                fitted = held.fitted(usable, scaling)
                ready |= {key: fitted[role] for role, key in held.keys.items()}
        require_usable(ready, own)
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
        require_fit("the values do not fit the adapter", shapes, ready)
        cast = {key: ready[key].to(dtype=tensor.dtype) for key, tensor in own.items()}
        raise_problems(
            f"the values do not fit {next(iter(own.values())).dtype}",
            {"too large": not_finite(cast)},
        )
        require_agreement(self.pairs, cast, shared, scalings)
        # In place: an optimizer's flat views and captured graphs hold the storage.
        return [filling(tensor, cast[key]) for key, tensor in own.items()]
