"""Small models of the classes of transformers: their configs shrunk, and inputs that they run on.

A config is shrunk by the names of its fields: widths are divided by one number, which keeps what
has to be divisible divisible, and layers, experts and vocabularies become few. Which number a class
allows is found by trying.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from benchmarks.zoo.timm_models import MOST, PREFIX, family_model, family_names


class Scale(NamedTuple):
    """How a config is shrunk.

    Attributes:
        width: what widths are divided by.
        layers: how many layers there are at most.
    """

    width: int
    layers: int


SCALES = [
    Scale(16, 2),
    Scale(8, 2),
    Scale(8, 4),
    Scale(4, 2),
    Scale(8, 99),
    Scale(2, 2),
    Scale(1, 2),
]
VOCABULARY, EXPERTS, SIDE = 160, 4, 224

_WIDTH = re.compile(
    r"hidden_size|hidden_dim|intermediate|ffn|embd|embed|d_model|d_ff|d_kv|d_inner|(^|_)dim($|s$|_)"
    r"|channels|width|head_dim|rank|projection_size|inner_size|filters|mlp_dim|state_size|mamba_d"
    r"|proj_size|feature_size|output_size"
)
_LAYERS = re.compile(
    r"(^|_)(num_)?(hidden_|encoder_|decoder_)?(layers?|blocks)$|^depth$|^n_layers?$"
)
_EXPERTS = re.compile(r"^(moe_)?(num|n)_(routed_|local_)?experts$")
_FEW = {"num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "num_queries": 20}
_IDS = re.compile(r"_(token_id|token_index|token_ids)$|^(image|video|audio)_(token|index)")


def class_names() -> list[str]:
    """Every model class that transformers knows, one of each family first, then timm's."""
    families: dict[str, list[str]] = {}
    for mapping, known in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and mapping.startswith("MODEL"):
            for family, names in known.items():
                for name in (names,) if isinstance(names, str) else names:
                    families.setdefault(family, []).append(name)
    rounds = range(max(map(len, families.values())))
    found = [own[i] for i in rounds for own in families.values() if i < len(own)]
    return list(dict.fromkeys([*found, *family_names()]))


def small_config(cls: type[Any], scale: Scale, ids: dict[int, int] | None = None) -> Any:
    """A config of a class, shrunk.

    Args:
        cls: the class.
        scale: by how much.
        ids: the ids of special tokens that were given so far, which have to differ.
    """
    ids = {} if ids is None else ids
    usual, changed = cls(), dict[str, Any]()
    for each in dataclasses.fields(cls):
        own, value = getattr(usual, each.name, None), each.default
        if isinstance(own, tf.PreTrainedConfig):
            changed[each.name] = small_config(type(own), scale, ids)
        elif value is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING:
            value = own if value is dataclasses.MISSING else value
            small = _small(each.name, value, scale, ids)
            if small != value:
                changed[each.name] = small
    return cls(**changed)


def _small(name: str, value: Any, scale: Scale, ids: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return type(value)(_small(name, v, scale, ids) for v in value)
    if type(value) is not int:
        return value
    if "vocab" in name:
        return min(value, VOCABULARY)
    if _IDS.search(name):
        return value if value < 90 else ids.setdefault(value, 90 + len(ids) % 60)
    if _EXPERTS.match(name):
        return min(value, EXPERTS)
    if name in _FEW:
        return min(value, _FEW[name])
    if _LAYERS.search(name):
        return min(value, scale.layers)
    if _WIDTH.search(name) and value % scale.width == 0 and value >= 2 * scale.width:
        return value // scale.width
    return value


class TooLargeError(ValueError):
    """A small config that is not small."""


class Small(NamedTuple):
    """A model with inputs that it runs on."""

    model: nn.Module
    inputs: dict[str, Any]


def build(name: str) -> Small:
    """A small model of this class.

    Raises:
        Exception: none could be built, or run: what was raised at first.
    """
    if name.startswith(PREFIX):
        model, inputs = family_model(name)
        return Small(lively(model), inputs)
    cls, errors = getattr(tf, name), list[Exception]()
    for scale in SCALES:
        try:
            return _running(_model(cls, small_config(cls.config_class, scale)))
        except (ImportError, TooLargeError):
            raise  # at other scales too
        except Exception as error:
            if str(error) in map(str, errors):
                break
            errors.append(error)
    raise errors[0]


def _running(model: nn.Module) -> Small:
    """The model with the first inputs that it runs on."""
    errors = []
    for inputs in _inputs(model):
        try:
            if tensors_of(run(model, inputs)):
                return Small(model, inputs)
            raise ValueError("it returns no tensor of floats")
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else ValueError("its inputs are not known")


def _model(cls: type[Any], config: Any) -> nn.Module:
    """A model with values at random, in eval mode."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        size = 0  # it computes with values when it is made
    if size > MOST:
        raise TooLargeError("its small config has too many parameters")
    torch.manual_seed(0)
    return lively(cls(config).eval())


def lively(model: nn.Module) -> nn.Module:
    """The model without parameters that let nothing through, as some begin."""
    with torch.no_grad():
        for parameter in model.parameters():
            same = parameter.numel() > 1 and parameter.min() == parameter.max()
            if same and parameter.abs().max() < 0.1 and parameter.is_floating_point():
                parameter.normal_(std=0.1)
    return model


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a model returns, with the same random numbers at each call."""
    torch.manual_seed(0)
    return model(**inputs)


def tensors_of(found: Any) -> list[Tensor]:
    """The tensors of floats in what a model returned."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() and found.numel() else []
    if isinstance(found, Mapping):
        found = list(found.values())
    elif dataclasses.is_dataclass(found):
        found = list(vars(found).values())
    if isinstance(found, (list, tuple)):
        return [tensor for each in found for tensor in tensors_of(each)]
    return []


def _inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs to try: all that are known by their names, then fewer."""
    arguments = inspect.signature(model.forward).parameters
    known = {name: _input(name, model) for name in arguments}
    known = {name: value for name, value in known.items() if value is not None}
    wanted = {name for name, a in arguments.items() if a.default is a.empty}
    main = {getattr(model, "main_input_name", "input_ids"), *wanted}
    decoder = {"decoder_input_ids"}
    images = {name for name in known if name.startswith("pixel") or name in _SHAPES}
    seen = list[set[str]]()
    for names in (main | decoder | images, main | decoder, main, {"input_ids"}, images):
        chosen = {name for name in names if name in known}
        if chosen and chosen not in seen:
            seen.append(chosen)
            uncached = {"use_cache": False} if "use_cache" in arguments else {}
            yield {**{name: known[name] for name in known if name in chosen}, **uncached}


def _asked(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    """The first number of these names in a config or in one inside of it."""
    inner = [v for v in vars(config).values() if isinstance(v, tf.PreTrainedConfig)]
    for name in names:
        for each in (config, *inner):
            value = getattr(each, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if type(value) is int and value > 0:
                return value
    return otherwise


# Inputs of fixed shapes, apart from ids and pictures.
_SHAPES: dict[str, tuple[int, ...]] = {
    "input_values": (2, 4000),
    "bbox": (2, 12, 4),
    "past_values": (2, 64, 1),
    "visual_feats": (2, 5, 0),
    "visual_pos": (2, 5, 4),
}


def _input(name: str, model: nn.Module) -> Tensor | None:
    """An input of a name; None for names that are not known."""
    config: Any = model.config
    torch.manual_seed(1)
    if name in ("input_ids", "decoder_input_ids"):
        most = _asked(config.get_text_config(), ("vocab_size",), VOCABULARY)
        return torch.randint(3, max(4, min(most, 90)), (2, 12))
    side = _asked(config, ("image_size", "crop_size", "input_size"), SIDE)
    channels = _asked(config, ("num_channels",), 3)
    if name == "pixel_values":
        return torch.randn(2, channels, side, side)
    if name == "pixel_values_videos":
        frames = _asked(config, ("num_frames", "frames_per_clip"), 4)
        return torch.randn(2, frames, channels, side, side)
    if name == "input_features":
        mels = _asked(
            config, ("num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel"), 80
        )
        length = 2 * _asked(config, ("max_source_positions",), 100)
        return torch.randn(2, mels, length) if length > 200 else torch.randn(2, length, mels)
    if name == "bbox":
        return torch.randint(0, 100, _SHAPES[name]).sort(-1).values
    if name in _SHAPES:
        wide = _asked(config, ("visual_feat_dim",), 16)
        return torch.randn([wide if n == 0 else n for n in _SHAPES[name]])
    return None
