"""The pairs of a PEFT file: which module each is for, with the alpha that the config gives it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.arithmetic.thinning import Drops
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData
from lora_inject.files.formats.merged_linear import enabled_spans, split
from lora_inject.files.formats.one_place import Given, is_repeated
from lora_inject.files.formats.pairs import divided, told_layout
from lora_inject.files.formats.peft_config import Scalings, fixed_by_start
from lora_inject.files.formats.peft_keys import OUT_PROJ, OUT_PROJ_TIMES, Names, pair_key
from lora_inject.files.formats.peft_nested import nested_parameters, unwrapped
from lora_inject.kinds.base import Form
from lora_inject.variants import SCALINGS

Found = dict[str, tuple[Form, Tensor, Tensor]]


def sorted_out(
    tensors: Mapping[str, Tensor], names: Names, path: Path
) -> tuple[Found, dict[str, Tensor]]:
    """(A and B by the path in the file, all other tensors by their name in the base).

    Raises:
        FormatError: a tensor is of no known kind, half of a pair, or there twice.
    """
    halves: dict[str, dict[str, tuple[Form, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    given = Given()
    for key, tensor in tensors.items():
        pair = pair_key(key)
        if pair is None:
            if ".lora_" in key:
                raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
            name = names.tensor(key)
            if name is not None and not is_repeated(given, name, key, tensor):
                others[name] = tensor
            continue
        owner, letter, embedding = pair
        form: Form = "embedding" if embedding else "conv" if tensor.dim() > 2 else "linear"
        if not is_repeated(given, (owner, letter), key, tensor):
            halves.setdefault(owner, {})[letter] = (form, tensor)
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {name} has only {' and '.join(half)} of lora_A and lora_B.")
    return {n: (half["A"][0], half["A"][1], half["B"][1]) for n, half in halves.items()}, others


class PairReader:
    """What makes pairs of the tensors of a file.

    Args:
        config: PEFT's config.
        own: the metadata that is ours.
        found: A and B by the path in the file.
        names: the names of modules without wrappers.
        modules: those of the model by path; None without a model.
        scalings: rank and alpha of each layer.
        path: the directory, for errors.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        own: Mapping[str, Any],
        found: Collection[str],
        names: Names,
        modules: Mapping[str, nn.Module] | None,
        scalings: Scalings,
        path: Path,
    ) -> None:
        self.names, self.scalings, self.path = names, scalings, path
        self.enabled: list[bool] = config.get("enable_lora") or []
        self.parts: Mapping[str, Any] = own.get("parts", {})
        self.dropouts = own.get("dropout", {})
        self.dropout = float(config.get("lora_dropout") or 0.0)
        self.fixed, self.all_fixed = own.get("fixed", {}), fixed_by_start(config)
        self.starts, self.drops = own.get("start", {}), own.get("drops", {})
        self.nested = nested_parameters(config, found, modules)
        outs = [key.removesuffix(OUT_PROJ) for key in found if names.is_out_proj(key)]
        self.weights = dict.fromkeys(outs, "in_proj_weight")
        if modules is None:  # which parameter it is of several is then open
            owners = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
            open_ones = [k for k in found if any(unwrapped(k).endswith(own) for own in owners)]
            self.weights |= dict.fromkeys(open_ones, "")

    def pairs(self, key: str, form: Form, A: Tensor, B: Tensor) -> list[PairData]:
        """The pair of a path in the file, or those of its parts.

        Raises:
            FormatError: its shapes are not what the config says.
        """
        if key in self.nested:
            found = [self._nested(key, A, B)]
        elif self.enabled:
            found = self._enabled(self.names.module(key), A, B)
        else:
            found = self._plain(key, form, A, B)
        path = found[0].path
        dropout = self.dropouts.get(path, self.dropout)
        fixed, start = self.fixed.get(path, self.all_fixed), self.starts.get(path, "")
        told = {"dropout": dropout, "fixed": fixed, "start": start}
        return [replace(p, **told, drops=Drops(*self.drops.get(path, ()))) for p in found]

    def _plain(self, key: str, form: Form, A: Tensor, B: Tensor) -> list[PairData]:
        name, in_attention = self.names.module(key), self.names.is_out_proj(key)
        if in_attention:
            B = B * OUT_PROJ_TIMES
        PairData(name, A, B, None)  # checked before its shapes are read
        weight = self.weights.get(key, "weight")
        if not weight and A.shape[0] != self.scalings.rank_of(name):
            raise FormatError(
                f"{self.path}: how many experts {name} has can be told by its model alone.",
                remedy="Give it: --model CONFIG.",
            )
        groups = max(1, A.shape[0] // B.shape[1])  # of a convolution: its rank counts all of them
        rule, alpha = SCALINGS[self.scalings.rule], self.scalings.alpha_of(name, A.shape[0])
        if groups > 1:
            alpha = rule.alpha(rule.factor(alpha, A.shape[0]), A.shape[0] // groups)
        data = PairData(name, A, B, alpha, form, weight, in_attention=in_attention, rule=rule.name)
        return list(divided(data, self.parts[name], self.path)) if name in self.parts else [data]

    def _nested(self, key: str, A: Tensor, B: Tensor) -> PairData:
        """The pair of a fused parameter, whose experts stand side by side."""
        module, name, weight = self.nested[key]
        W = module._parameters[weight]
        assert W is not None
        experts = W.shape[0] if W.dim() == 3 else 1
        if A.shape[0] % experts or B.shape[-1] != A.shape[0]:
            raise FormatError(f"{self.path}: {key} does not divide into {experts} experts.")
        if W.dim() == 3:
            A = A.reshape(experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        alpha, rule = self.scalings.alpha_of(f"{name}.{weight}", A.shape[-2]), self.scalings.rule
        layout = told_layout(module, W)
        return PairData(name, A, B, alpha, "experts", weight, layout=layout, rule=rule)

    def _enabled(self, name: str, A: Tensor, B: Tensor) -> list[PairData]:
        """The parts of a fused projection, whose B the first PEFT had as a grouped convolution."""
        B = B.squeeze(-1) if B.dim() == 3 else B
        pair = PairData(name, A, B, None)  # checked before its shapes are read
        alpha = self.scalings.alpha_of(name, pair.rank)
        spans = enabled_spans(self.enabled, len(B))
        total = len(B) // len(spans) * len(self.enabled)
        return split(replace(pair, alpha=alpha, rule=self.scalings.rule), spans, total)
