"""For TRL: the policy is its own reference, and what vLLM gets is the merged model.

TRL asks PEFT's models for what it needs of an adapter. Of any other model it makes the reference
anew, from the directory that the base came from, and gives vLLM the parameters as they stand.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.adapters.copying import copy_adapter
from lora_inject.adapters.disabled import disabled
from lora_inject.adapters.use import in_use
from lora_inject.changes.modes import in_eval_mode
from lora_inject.core.look import Look
from lora_inject.core.paths import without_infixes
from lora_inject.core.state import owned
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.files.stored import Stored
from lora_inject.integrations.calling import trainer_above
from lora_inject.merging.merge import merged

COPY = "ref"  # PEFT's name for it too


class Reference(nn.Module):
    """A model that computes what its policy computed at first; it has no parameters.

    Where TRL wants a reference model it has what TRL asks one for. A call runs the policy itself,
    in eval mode, without gradients and with the adapters of the reference.

    Args:
        policy: the adapted model.
        weights: the adapters of the reference, with the weights that they count with.
    """

    policy: Any

    def __init__(self, policy: nn.Module, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.__dict__["policy"] = policy  # and no module of it
        self.weights = weights
        self._is_fixed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy computed at first.

        Raises:
            LoRAInjectError: a trainer would move it, its adapters train now or are there no more,
                or the policy is merged or in a block.
        """
        if not self._is_fixed:
            _require_fixed(trainer_above())
            self._is_fixed = True
        with self._shown(), torch.no_grad():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's own, with whatever TRL has put in its place."""
        return self.policy(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's, with the values of the reference: TRL tells by it what it has cached."""
        with self._shown():
            return self.policy.state_dict(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The policy's."""
        return self.policy.config

    @property
    def base_model(self) -> Any:
        """The policy's, which is the reference's while that is called."""
        return self.policy.base_model

    def get_output_embeddings(self) -> Any:
        """The policy's, which are the reference's while that is called."""
        return self.policy.get_output_embeddings()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Let the policy be the reference.

        Raises:
            LoRAInjectError: it has these adapters no more, or trains one of them.
        """
        look = Look(self.policy)
        look.require_adapters()
        look.require_awake()
        look.require_known(self.weights, "reference")
        if moving := sorted(self.weights.keys() & _training(look)):
            raise LoRAInjectError(
                f"the adapter {moving[0]!r} is the reference, and trains now: it moves.",
                remedy="Freeze it: use(model, ..., train=...); or call reference again.",
            )
        shown = in_use(look, self.weights) if self.weights else disabled(self.policy)
        with shown, in_eval_mode(look.index.modules):
            yield


def reference(model: nn.Module, adapter: str | None = None) -> Reference:
    """The reference model of a policy that is adapted: the policy as it is now, without a copy.

    For ``ref_model=`` of TRL's trainers, and for ``trainer.ref_model`` of one that takes none
    (``connect`` does that). Where nothing has trained yet it is the base model. Where the start is
    an adapter that was trained, a frozen copy of that, named "ref", comes into the model.

    Example:
        >>> trainer = DPOTrainer(model, reference(model), arguments, ...)  # doctest: +SKIP

    Args:
        model: an adapted model, before it is trained.
        adapter: the name of an adapter that does not train, to be the reference; None for the
            model as it is.

    Returns:
        What TRL takes for a model.

    Raises:
        ArgumentError: the adapter is not known, or trains; or there is a "ref" already.
        LoRAInjectError: the model has no adapters, as after ``strip(merge=True)``; they are merged,
            or it is inside a block.
    """
    look = Look(model)
    if not look.adapted:
        raise LoRAInjectError(
            "the model has no adapters, and TRL would load its reference from the directory that "
            "the model came from, whatever was merged into it since.",
            remedy="Call inject first; or give TRL a copy, copy.deepcopy(model).",
        )
    look.require_awake()
    trains = _training(look)
    if adapter is not None:
        look.require_known([adapter], "adapter")
        if adapter in trains:
            raise ArgumentError(
                f"adapter: {adapter!r} trains, and the reference would move with it.",
                remedy="Leave it out for a frozen copy, or freeze it: use(model, ..., train=...).",
            )
        return Reference(model, {adapter: 1.0})
    weights = dict(look.used)
    moving = [name for name in weights if name in trains and not _is_at_start(model, name)]
    still = {name: weight for name, weight in weights.items() if name not in trains}
    names = {name: COPY if len(moving) == 1 else f"{COPY}_{name}" for name in moving}
    if taken := sorted(set(names.values()) & look.known.keys()):
        raise ArgumentError(
            f"there is an adapter {taken[0]!r} already, of an earlier reference.",
            remedy=f"reference(model, {taken[0]!r}) is that one; remove(model, {taken[0]!r}) "
            "makes room for another.",
        )
    for name, copied in names.items():
        copy_adapter(Look(model), name, copied)
    return Reference(model, {**still, **{names[name]: weights[name] for name in moving}})


def connect(trainer: Any, *, beta: float | None = None, adapter: str | None = None) -> None:
    """Let a trainer that TRL has made use the adapters: those that take no ``ref_model``.

    GRPO and RLOO load a second model where ``beta`` is not 0. Made with ``beta=0.0`` they load
    none, and get ``beta`` and the reference here. Where they generate with vLLM, that gets merged
    weights under the names that the model has without adapters.

    Example:
        >>> trainer = GRPOTrainer(model, rewards, GRPOConfig(beta=0.0))  # doctest: +SKIP
        >>> connect(trainer, beta=0.04)  # doctest: +SKIP

    Args:
        trainer: a trainer of TRL, before ``train``.
        beta: the weight of the KL term; None for what the trainer has.
        adapter: as for ``reference``.

    Raises:
        ArgumentError: as ``reference``.
        LoRAInjectError: as ``reference``, or the trainer would move its reference
            (``sync_ref_model=True``).
    """
    _require_fixed(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = getattr(trainer, "beta", 0.0) if beta is None else beta
    if own and not isinstance(getattr(trainer, "ref_model", None), Reference):
        trainer.ref_model = reference(model, adapter)
    trainer.beta = own
    if getattr(trainer, "vllm_generation", None) is not None:
        _push_merged(trainer.vllm_generation, model)


def _push_merged(generation: Any, model: nn.Module) -> None:
    """Let TRL push to vLLM what the model computes with, under the names that vLLM knows.

    Raises:
        LoRAInjectError: it is another version of TRL, with other names for its methods.
    """
    push = generation.sync_weights
    named = getattr(generation, "_iter_named_params", None)
    if named is None:
        raise LoRAInjectError(
            "this version of TRL pushes weights to vLLM in a way that is not known here.",
            remedy="Generate without vLLM (use_vllm=False), or install trl 1.16.",
        )

    def plain() -> Iterator[tuple[str, Tensor]]:
        ours = _names_of_adapters(Look(model))
        return ((name, tensor) for name, tensor in named() if name not in ours)

    def push_merged() -> None:
        with merged(model):
            push()

    generation._iter_named_params, generation.sync_weights = plain, push_merged


def _names_of_adapters(look: Look) -> set[str]:
    """The names of the parameters that the model has for adapters alone, without wrappers'."""
    names = set()
    for path, module in look.index.by_path.items():
        state = look.adapted.get(module)
        places = {trained.name for trained in state.trained} if state else set()
        own = without_infixes(path)
        names |= {f"{own}.{n}".lstrip(".") for n, *_ in owned(state) if n not in places}
    return names


def _training(look: Look) -> set[str]:
    """The adapters that train."""
    return {name for state in look.adapted.values() for name in state.use.trains}


def _is_at_start(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter is known to change nothing yet."""
    data = Stored(model, adapter).data()
    return not data.tensors and not data.tables and all(pair.is_untrained for pair in data.pairs)


def _require_fixed(trainer: Any) -> None:
    """Refuse a trainer that moves its reference towards the policy.

    Raises:
        LoRAInjectError: it does.
    """
    if getattr(getattr(trainer, "args", None), "sync_ref_model", False):
        raise LoRAInjectError(
            "sync_ref_model=True moves the parameters of a second model towards the policy, and "
            "here the policy is its own reference.",
            remedy="Use sync_ref_model=False, or give TRL a copy of the model as ref_model.",
        )
