"""What an adapter is to a weight: how its tensors become a change of it, and which of them train.

A new one is a file of its own and a line in a table here. What files call it stands with it
(``peft``); what a format has no word for, it says in its metadata or refuses.
"""

from lora_inject.variants.change import SIDES, Change, LayerKind, Spec, name_prefix
from lora_inject.variants.dora import DoRA, PackedDoRA
from lora_inject.variants.dora_columns import ColumnDoRA
from lora_inject.variants.dora_lycoris import (
    ColumnDoRALoHa,
    ColumnDoRALoKr,
    DoRALoHa,
    DoRALoKr,
)
from lora_inject.variants.loha import LoHa
from lora_inject.variants.lokr import LoKr
from lora_inject.variants.lora import Scaling, Variant
from lora_inject.variants.lora_fa import FIXED, OTHER
from lora_inject.variants.rows import Rows
from lora_inject.variants.rslora import RankStabilized
from lora_inject.variants.tucker import Tucker

__all__ = [
    "FIXED", "OTHER", "ROLES", "SCALINGS", "SIDES", "VARIANTS", "Change", "ColumnDoRA", "DoRA",
    "LayerKind", "LoHa", "LoKr", "Rows", "Scaling", "Spec", "Tucker", "Variant", "name_prefix",
]  # fmt: skip

SCALINGS: dict[str, Scaling] = {scaling.name: scaling for scaling in (Scaling(), RankStabilized())}
VARIANTS: dict[str, type[Variant]] = {
    variant.name: variant
    for variant in (
        Variant, DoRA, ColumnDoRA, LoHa, LoKr, Tucker,
        DoRALoHa, DoRALoKr, ColumnDoRALoHa, ColumnDoRALoKr,
    )
}  # fmt: skip
# What a variant becomes on some layers, and what is asked for by ids and not by name.
_OTHERS: tuple[type[Variant], ...] = (PackedDoRA, Rows)
# Every tensor that some adapter has.
ROLES = tuple(dict.fromkeys(
    role for variant in (*VARIANTS.values(), *_OTHERS) for role in variant(offset=True).roles
))  # fmt: skip
