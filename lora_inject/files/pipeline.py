"""Adapters of the components of a pipeline, in one file as the tools for images have them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from lora_inject.core.drift import require_nothing_gone
from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files import cautions, hub, left_out
from lora_inject.files.formats import FORMATS, find_format, named_format
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.image_names import COMPONENTS
from lora_inject.files.formats.storage import as_path
from lora_inject.files.loading import Loading
from lora_inject.files.save_load import on_one_rank
from lora_inject.files.stored import Stored
from lora_inject.files.token_rows import warn_of_unsaved_rows
from lora_inject.settings import check_adapter, check_alpha
from lora_inject.training.freeze import freeze_adapter


def save_pipeline(
    pipe: Any, path: str | PathLike[str], *, adapter: str | None = None, format: str = "diffusers"
) -> None:
    """Save the adapters of all components of a pipeline of diffusers into one file.

    The names are those that the tools know: of a "kohya" file ComfyUI, A1111 and kohya's scripts
    (``lora_unet``, ``lora_te`` or ``lora_te1`` and ``lora_te2``; SDXL's UNet and Flux by the names
    of their checkpoints, with q, k and v fused), of a "diffusers" directory
    ``pipe.load_lora_weights``, which alone reads alpha where it stands there.

    Example:
        >>> inject(pipe.unet, ["to_q", "to_v"], r=4)  # doctest: +SKIP
        >>> inject(pipe.text_encoder, ["q_proj", "v_proj"], r=4)  # doctest: +SKIP
        >>> save_pipeline(pipe, "lora.safetensors", format="kohya")  # doctest: +SKIP

    Args:
        pipe: a pipeline, or whatever has its models in a mapping ``components`` by their names.
        path: a directory for "diffusers", a file for "kohya".
        adapter: the name that the adapter has in every component; None for the only one there is,
            or the only one in use. Components without it are left out.
        format: "diffusers" or "kohya".

    Raises:
        ArgumentError: the format or the adapter is not known, or no component has one.
        FormatError: the format has no word for something of an adapter, or for a component that
            has one. Nothing has been written then.
        LoRAInjectError: as ``save``.
    """
    writer, models = _with_components(named_format(format, "format")), _models(pipe)
    looks = {name: Look(model) for name, model in models.items()}
    wanted = None if adapter is None else check_adapter(adapter)
    having = {n: k for n, k in looks.items() if k.known and (wanted is None or wanted in k.known)}
    if not having:
        raise ArgumentError(
            f"adapter={wanted!r}: no component has it, of {', '.join(models)}.",
            remedy="inject(pipe.unet, ...) puts one in.",
        )
    encoders = sum(name.startswith("text_encoder") for name in models)
    stored = {name: Stored(look.model, wanted, look) for name, look in having.items()}
    parts: list[AdapterData] = []
    for name, own in stored.items():
        if name not in COMPONENTS:
            raise FormatError(
                f"{name} has an adapter, which no tool looks for in a file of a pipeline.",
                remedy=f"Save it apart, save(pipe.{name}, ...), and remove it.",
            )
        data = replace(own.data(), component=name, encoders=encoders)
        require_nothing_gone(own.look, own.name)
        cautions.warn_of_untrained(data, own.name)
        left_out.require_nothing_left_out(own.look, "the file")
        warn_of_unsaved_rows(own.look, own.paths, data.tensors)
        left_out.warn_of_unsaid_others(data, own.name, format)
        parts.append(data)
    file = as_path(path)
    cautions.warn_of_directory(file, format)
    on_one_rank(stored.values(), partial(writer.write_all, parts, file))


def load_pipeline(
    pipe: Any,
    path: str | PathLike[str],
    *,
    adapter: str = "default",
    format: str | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    other_base: bool = False,
    trainable: bool = True,
) -> Any:
    """Load a file with adapters for the components of a pipeline, into all of them or none.

    Each component takes its part, as ``load`` does: UNet or transformer, and text encoders, from
    files of diffusers, kohya's scripts, ai-toolkit, A1111 and ComfyUI.

    Example:
        >>> load_pipeline(pipe, "lora.safetensors")  # doctest: +SKIP

    Args:
        pipe: a pipeline, or whatever has its models in a mapping ``components`` by their names.
        path: a file, or a directory of diffusers, or the name of a repository of the Hugging Face
            hub, as in ``load``.
        adapter: the name to load them under.
        format: "diffusers" or "kohya"; None finds out.
        alpha: for layers of which the file does not say it; None takes the rank, as the tools do.
        dtype: as in ``load``.
        other_base: as in ``load``.
        trainable: as in ``load``.

    Returns:
        The same pipeline.

    Raises:
        ArgumentError: an argument cannot be used.
        FormatError: the file cannot be read, holds nothing for the pipeline, or a part of it does
            not fit its component. Nothing has changed then.
        LoRAInjectError: as ``load``.
    """
    adapter, file = check_adapter(adapter), hub.found(as_path(path))
    alpha = None if alpha is None else check_alpha(alpha, "alpha")
    reader = _with_components(find_format(file, format))
    with torch.inference_mode(False), torch.no_grad():
        ready, left = [], list[Mapping[str, int]]()
        for name, model in _models(pipe).items():
            if name not in COMPONENTS:
                continue
            look = Look(model)
            look.require_awake()
            data = reader.read(file, look.index, alpha, name)
            left.append(data.left)
            if data.pairs:
                ready.append(Loading(look, data, adapter, dtype, other_base))
        if not ready:
            raise FormatError(f"{file} holds nothing for {', '.join(_models(pipe))}.")
        _apply(ready)
        nobodys = {front: n for front, n in left[0].items() if all(front in own for own in left)}
        left_out.warn_of_left_parts(AdapterData((), left=nobodys))
        for loading in ready:
            loading.warn()
            if not trainable:
                freeze_adapter(loading.look.model, adapter)
    return pipe


def _apply(ready: list[Loading]) -> None:
    """Put all in, or none."""
    done: list[Loading] = []
    try:
        for loading in ready:
            loading.apply()
            done.append(loading)
    except BaseException:
        for loading in reversed(done):
            loading.undo()
        raise


def _models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by their names in it.

    Raises:
        ArgumentError: it has none.
    """
    components = getattr(pipe, "components", None)
    named = components.items() if isinstance(components, Mapping) else ()
    models = {str(name): model for name, model in named if isinstance(model, nn.Module)}
    if not models:
        raise ArgumentError(
            f"pipe must have models in a mapping components, and {type(pipe).__name__} has none.",
            remedy="For a single model: save(model, ...), load(model, ...).",
        )
    return models


def _with_components(format: Any) -> Any:
    """A format whose files are for whole pipelines.

    Raises:
        ArgumentError: it is another.
    """
    if not hasattr(format, "write_all"):
        able = [name for name, own in FORMATS.items() if hasattr(own, "write_all")]
        raise ArgumentError(
            f"format must be one of {able} for a pipeline.",
            remedy="Other files are for one model: save(pipe.unet, ...), load(pipe.unet, ...).",
        )
    return format
