"""A user's own module, for `--spec tests.model.own_specs SPEC`."""

from mellum2_megatron.architecture import RopeParameters
from mellum2_megatron.model.layer_specs import layer_spec
from tests.model.hf_reference import SMALL

ARCHITECTURE = SMALL.replace(
    rope_full_attention=RopeParameters(
        rope_type="yarn", rope_theta=500_000.0, factor=4.0, original_max_position_embeddings=16
    )
)
SPEC = layer_spec(ARCHITECTURE, "torch")
