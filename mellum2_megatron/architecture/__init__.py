"""The Mellum 2 architecture, and its translations to `config.json` and to Megatron's fields.

No torch at import.
"""

from mellum2_megatron.architecture.checks import MOST_MTP_LAYERS, LayerType, MlpType
from mellum2_megatron.architecture.finding import find_architecture
from mellum2_megatron.architecture.hf_config import from_hf_config, to_hf_config
from mellum2_megatron.architecture.latent_attention import LatentAttention
from mellum2_megatron.architecture.megatron_fields import architecture_arguments
from mellum2_megatron.architecture.mellum2 import (
    ALIGNMENT,
    PRESETS,
    Mellum2Architecture,
)
from mellum2_megatron.architecture.parameter import Component, Parameter, Shape
from mellum2_megatron.architecture.rope import RopeParameters

__all__ = [
    "ALIGNMENT",
    "MOST_MTP_LAYERS",
    "PRESETS",
    "Component",
    "LatentAttention",
    "LayerType",
    "Mellum2Architecture",
    "MlpType",
    "Parameter",
    "RopeParameters",
    "Shape",
    "architecture_arguments",
    "find_architecture",
    "from_hf_config",
    "to_hf_config",
]
