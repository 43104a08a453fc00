"""Megatron-Bridge's mapping registry, made from the table in `conversion.mapping`.

Bridge takes a Megatron weight's name from the model in memory, the table takes its key in a
checkpoint. `parameter_pattern` translates. A ``*`` stands for a layer or an expert on both sides.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping

from conversion.mapping import PLACES, Place
from conversion.rows import GroupedHeads, Row, Same, StackedRows


def mapping_registry() -> MegatronMappingRegistry:
    """Return the registry of every weight that a Mellum 2 model can have, MTP included."""
    # Bridge finds a weight's kind of parallelism by the name of its module's class
    # (megatron/bridge/models/conversion/param_mapping.py:1396-1434, 0.6.2).
    AutoMapping.register_module_type("Mellum2Router", "replicated")
    return MegatronMappingRegistry(
        *(_mapping(place, row) for place in PLACES for row in place.rows)
    )


def parameter_pattern(place: Place, row: Row) -> str:
    """Return the name pattern of a row's weights in the model in memory."""
    # multi_token_prediction.py:1551-1558 (megatron/core/transformer, 0.19.2) renames the module in
    # checkpoints.
    prefix = place.megatron.replace(".transformer_layer.", ".mtp_model_layer.")
    # A checkpoint has one tensor for all layers and all experts. In the model each layer is a
    # module, and Transformer Engine's grouped linear has one weight per expert, numbered from 0.
    if place.layer_axis:
        prefix += "*."
    name = row.megatron.replace("experts.experts.", "experts.")
    return prefix + name + ("*" if row.per_expert else "")


def _mapping(place: Place, row: Row) -> Any:
    """Return Bridge's mapping of a row, by the row's transform.

    Raises:
        TypeError: a transform that Bridge has no mapping for, which is a programming error.
    """
    megatron = parameter_pattern(place, row)
    names = [
        (place.huggingface + name).format(layer="*", expert="*") for name, _ in row.huggingface
    ]
    if isinstance(row.transform, Same):
        return AutoMapping(megatron, *names)
    if isinstance(row.transform, GroupedHeads):
        query, key, value = names
        return QKVMapping(megatron, q=query, k=key, v=value)
    if isinstance(row.transform, StackedRows):
        gate, up = names
        return GatedMLPMapping(megatron, gate=gate, up=up)
    raise TypeError(
        f"{row.megatron}: Megatron-Bridge has no mapping for {type(row.transform).__name__}"
    )
