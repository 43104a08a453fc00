"""Mellum's configuration class for versions of transformers that lack it or its MTP fields.

transformers has the class from 5.10.1 and the fields from 5.20. Megatron-Bridge 0.6.2 needs
transformers <= 5.12.1, and NeMo-RL an even older one; both read ``config.json`` through
`AutoConfig`. Importing this module registers nothing; call `register_fallback_config`.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

MODEL_TYPE = "mellum"


def register_fallback_config() -> bool:
    """Register and log a `MellumConfig` if transformers has none, or one without MTP fields.

    If transformers has Mellum's model, `AutoModelForCausalLM` still finds it.

    Returns:
        True if a class was registered.
    """
    import transformers

    host, version = host_config(), transformers.__version__
    if host is not None and "num_mtp_layers" in getattr(host, "attribute_map", {}):
        logger.info(
            "AutoConfig of transformers %s has a MellumConfig with MTP fields: nothing registered",
            version,
        )
        return False
    missing = "MellumConfig" if host is None else "MTP fields of MellumConfig"
    logger.warning("transformers %s has no %s: registering this project's", version, missing)
    base = _plain_config() if host is None else host
    transformers.AutoConfig.register(MODEL_TYPE, _with_mtp_fields(base), exist_ok=True)
    return True


def host_config() -> type | None:
    """Return the class that `AutoConfig` has for Mellum; None if it has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Not `get`: only the mapping's own __getitem__ imports the class.
    return CONFIG_MAPPING[MODEL_TYPE] if MODEL_TYPE in CONFIG_MAPPING else None  # noqa: SIM401


def _plain_config() -> type:
    """Return a configuration class of Mellum without MTP."""
    # As transformers/models/mellum/configuration_mellum.py, 5.12.1.
    from transformers import PreTrainedConfig

    class MellumConfig(PreTrainedConfig):
        model_type = MODEL_TYPE
        keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
        attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012

        vocab_size: int = 98304
        hidden_size: int = 2304
        intermediate_size: int = 7168
        num_hidden_layers: int = 28
        num_attention_heads: int = 32
        num_key_value_heads: int = 4
        hidden_act: str = "silu"
        max_position_embeddings: int = 131072
        initializer_range: float = 0.02
        rms_norm_eps: float = 1e-6
        use_cache: bool = True
        tie_word_embeddings: bool = False
        rope_parameters: dict[str, Any] | None = None
        attention_bias: bool = False
        sliding_window: int | None = 1024
        attention_dropout: float = 0.0
        moe_intermediate_size: int = 896
        num_experts_per_tok: int = 8
        num_experts: int = 64
        norm_topk_prob: bool = True
        output_router_logits: bool = False
        router_aux_loss_coef: float = 0.001
        pad_token_id: int | None = None
        bos_token_id: int | None = None
        eos_token_id: int | list[int] | None = None
        head_dim: int = 128
        layer_types: list[str] | None = None
        mlp_layer_types: list[str] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            if self.layer_types is None:
                self.layer_types = ["full_attention"] * self.num_hidden_layers
            if self.mlp_layer_types is None:
                self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
            if self.rope_parameters is None:
                self.rope_parameters = {
                    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                }
            # Mellum has one set of rope parameters per layer type; the base class would reject the
            # types as unknown keys.
            super().__post_init__(
                **kwargs, ignore_keys_at_rope_validation={"sliding_attention", "full_attention"}
            )

        def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
            # Mellum has no older format that would have to be translated.
            return kwargs

    return MellumConfig


def _with_mtp_fields(base: Any) -> type:
    """Return ``base`` with the MTP fields of transformers 5.20 and later."""

    # The same name as `base`: by it `AutoModelForCausalLM` finds the model class
    # (transformers/models/auto/auto_factory.py, 5.12.1).
    class MellumConfig(base):  # type: ignore[misc]  # a base class known only at run time
        attribute_map = base.attribute_map | {"num_mtp_layers": "num_nextn_predict_layers"}

        num_mtp_layers: int | None = None
        mtp_layer_types: list[str] | None = None
        mtp_mlp_layer_types: list[str] | None = None

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            if self.num_mtp_layers:
                if self.mtp_layer_types is None:
                    self.mtp_layer_types = ["sliding_attention"] * self.num_mtp_layers
                if self.mtp_mlp_layer_types is None:
                    self.mtp_mlp_layer_types = ["sparse"] * self.num_mtp_layers

    return MellumConfig
