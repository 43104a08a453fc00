"""The Mellum 2 architecture, and its translations to `config.json` and to Megatron's fields.

No torch at import.
"""

from mellum2_megatron.architecture.hf_config import from_hf_config, to_hf_config
from mellum2_megatron.architecture.megatron_fields import architecture_arguments
from mellum2_megatron.architecture.mellum2 import (
    ALIGNMENT,
    PRESETS,
    Component,
    LayerType,
    Mellum2Architecture,
    Parameter,
    Shape,
)
from mellum2_megatron.architecture.rope import RopeParameters

__all__ = [
    "ALIGNMENT",
    "PRESETS",
    "Component",
    "LayerType",
    "Mellum2Architecture",
    "Parameter",
    "RopeParameters",
    "Shape",
    "architecture_arguments",
    "from_hf_config",
    "to_hf_config",
]
