"""A copy of an adapter under another name: the same values in tensors of its own, frozen."""

from torch import Tensor

from lora_inject.core.adaptation import Content, adaptation
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.site import Site
from lora_inject.sharding import whole


def copy_adapter(look: Look, adapter: str, name: str) -> None:
    """Put an adapter into a model that is what another one is now; it is not in use.

    Args:
        look: the model, not merged and in no block.
        adapter: the one to copy.
        name: of the copy; no adapter has it.
    """
    sites, values = list[Site](), dict[tuple[str, str], dict[str, Tensor]]()
    for layer, own in look.leaders_first:
        if own.name != adapter:
            continue
        path = look.target_path(layer, own)
        follows = look.target_path(*look.leader(layer, own)) if own.follows else ""
        for pair in own.pairs:
            tensors = {role: t.detach() for role, t in pair.tensors(layer).items()}
            values[path, pair.spec.prefix] = tensors
        dtype = next(iter(tensors.values())).dtype
        sites.append(
            Site((path,), type(layer).__name__, layer, own.kind, own.way, own.specs, own.settings,
                 dtype, own.pattern, 0, follows)
        )  # fmt: skip
    owned = [(m, trained) for m, trained in look.trained if adapter in trained.owners]
    stand = [(m, t.name, look.tensor(m, t, adapter)) for m, t in owned]
    tops = [module for module, state in look.states.items() if adapter in state.reach.tops]
    content = Content(
        look.known[adapter],
        {look.index.path(module): module for module in tops},
        {(module, trained.name): trained.owners[adapter] for module, trained in owned},
        values,
        {(module, key): whole(t.detach()) for module, key, t in stand if t is not None},
        joins=False,
    )
    made = adaptation(look, tuple(sites), name, 0, content)
    commit(look, made.states, fresh=made.fresh, values=made.values)
