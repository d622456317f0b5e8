"""A vocabulary that is resized under adapters: new rows have a delta of zero, old ones keep theirs.

``resize_token_embeddings`` of transformers gives embeddings other weights and puts new heads in the
place of old ones. While a model has adapters it has one of ours, which lets the model's own do that
and takes states and tensors along.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import Edit, put_gradient, value_edit
from lora_inject.compat.marks import RESIZE, resizable_embeddings
from lora_inject.core.adapter import Adapter
from lora_inject.core.look import Look
from lora_inject.core.state import Fresh, State
from lora_inject.core.state_parts import Trained
from lora_inject.errors import UnsupportedLayerError
from lora_inject.own import own_tensor
from lora_inject.variants import SIDES, Spec

Values = dict[int, list[Edit]]  # by the tensor: tied ones are written once


class Resizing:
    """The model's ``resize_token_embeddings``, after which adapters fit.

    It knows the model weakly, as hooks do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self) -> Any:
        return Resizing, (self.model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own does."""
        model = self.model()
        assert model is not None, "its method was called"
        look = Look(model)
        look.require_awake()
        tables = {look.index.path(table): table for table in resizable_embeddings(model)}
        for path, table in tables.items():
            _require_resizable(look, path, table)
        resized = getattr(type(model), RESIZE)(model, *args, **kwargs)
        _settle(look, Look(model), tables)
        return resized


def _require_resizable(look: Look, path: str, table: nn.Module) -> None:
    """Refuse what new rows cannot leave as it is.

    Raises:
        UnsupportedLayerError: an adapter is more than ``B A`` for all rows.
    """
    for adapter in look.states[table].adapters if table in look.states else ():
        more = set(adapter.settings.variant.roles) - SIDES.keys()
        if more or any(spec.part for spec in adapter.specs) or adapter.way == "weight":
            raise UnsupportedLayerError(
                f"its adapter {adapter.name!r} cannot have rows added: it is no plain A and B.",
                path=path,
                remedy="Save it and strip, resize, and inject again.",
            )


def _settle(before: Look, now: Look, tables: Mapping[str, nn.Module]) -> None:
    """Take states to the modules that stand in the places now, and tensors to their rows."""
    from lora_inject.core.commit import commit  # which puts our method on models

    states, fresh, values = dict[nn.Module, State](), Fresh(), Values()
    for path, old in tables.items():
        state, new = before.states.get(old), now.index.by_path.get(path)
        if state is None or new is None:
            continue
        table = own_tensor(new, "weight")
        if table is None:
            continue
        if new is not old:
            state = _moved(state, old, new, fresh)
        adapters = tuple(_resized(a, old, len(table), values) for a in state.adapters)
        trained = tuple(_with_rows(t, state, old, new, values) for t in state.trained)
        states[new] = state.change(adapters=adapters, trained=trained)
    edits = [edit for each in values.values() for edit in each]
    commit(now, states, fresh=fresh, values=edits, flags="owned")


def _moved(state: State, old: nn.Module, new: nn.Module, fresh: Fresh) -> State:
    """The state for a module in the place of another, with what adapters have on that."""
    known = dict(state.before.flags)
    flags = tuple((n, known.get(n, True)) for n, p in new._parameters.items() if p is not None)
    before = state.before._replace(cls=type(new), flags=flags)
    own = fresh.setdefault(new, {})
    for adapter in state.adapters:
        own |= {(name, adapter.name): own_tensor(old, name) for name in adapter.parameters}
    for trained in state.trained:
        for owner, home in state.homes(trained).items():
            at = new if home == trained.name else old
            own[trained.name, owner] = own_tensor(at, home)
    return State(before, state.reach, state.use, state.adapters, state.trained)


def _resized(adapter: Adapter, layer: nn.Module, rows: int, values: Values) -> Adapter:
    """The adapter for another number of rows; those that its tensors gain are zero."""
    specs = []
    for pair in adapter.pairs:
        of_A = (adapter.kind.form(layer) == "embedding") is not pair.spec.swapped
        specs.append(_spec(pair.spec, of_A, rows))
        for role, name in pair.names.items():
            tensor = own_tensor(layer, name)
            if tensor is not None and role.startswith("A" if of_A else "B"):
                values[id(tensor)] = _edits(tensor, _cut(tensor, rows, 1 if of_A else 0))
    return replace(adapter, specs=tuple(specs))


def _spec(spec: Spec, of_A: bool, rows: int) -> Spec:
    if of_A:
        return replace(spec, n_in=rows, A_shape=(spec.A_shape[0], rows))
    return replace(spec, n_out=rows, B_shape=(rows, spec.B_shape[1]))


def _cut(tensor: Tensor, rows: int, dim: int) -> Tensor:
    """The values with so many rows: the first ones, and zeros after them."""
    value, kept = tensor.detach(), min(rows, tensor.shape[dim])
    shape = [rows if i == dim else n for i, n in enumerate(value.shape)]
    new = value.new_zeros(shape)
    new.narrow(dim, 0, kept).copy_(value.narrow(dim, 0, kept))
    return new


def _edits(tensor: Tensor, value: Tensor) -> list[Edit]:
    """Give a tensor a value of another shape, which its gradient would not fit."""
    edits = [value_edit(tensor, value)]
    if tensor.grad is not None and tensor.grad.shape != value.shape:
        edits.insert(0, (put_gradient, tensor, None, tensor.grad, None))
    return edits


@torch.no_grad()
def _with_rows(
    trained: Trained, state: State, old: nn.Module, new: nn.Module, values: Values
) -> Trained:
    """What trains in place, with the rows that the base has now after those that were there."""
    now, former = own_tensor(new, trained.name), trained.former
    if now is None or former is None or now.shape == former.shape:
        return trained
    rows = len(now)
    for home in state.homes(trained).values():
        waiting = own_tensor(old, home) if home != trained.name else None
        if waiting is not None:
            values[id(waiting)] = _edits(waiting, _joined(waiting, now, rows))
    return replace(trained, former=_joined(former, now, rows))


def _joined(first: Tensor, rest: Tensor, rows: int) -> Tensor:
    first = first.detach()
    tail = rest.detach().to(first.device, first.dtype)
    return torch.cat([first[:rows], tail[len(first) :]]).clone()
