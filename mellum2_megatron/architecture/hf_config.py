"""`Mellum2Architecture` <-> Hugging Face ``config.json``.

The reader gives an absent key the default of transformers 5.23's ``MellumConfig``
(``transformers/models/mellum/configuration_mellum.py``), so both read a folder alike. In
particular, absent ``layer_types`` mean full attention in every layer, and the RoPE base of sliding
layers defaults to 10,000. A key that asks for arithmetic outside Mellum 2 is refused. An unknown
key is dropped with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mellum2_megatron.architecture.checks import LARGEST
from mellum2_megatron.architecture.mellum2 import Mellum2Architecture
from mellum2_megatron.architecture.rope import RopeParameters
from mellum2_megatron.common.errors import InputError, nearest
from mellum2_megatron.common.field_checks import is_int, require, require_positive_int

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 98304,
    "hidden_size": 2304,
    "intermediate_size": 7168,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 896,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "sliding_window": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Defaults of MellumConfig for the fields that carry over by name."""

_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
"""MellumConfig's default of ``rope_parameters``. The released files give both a base of 500,000."""

_ALIASES = {"num_local_experts": "num_experts", "num_mtp_layers": "num_nextn_predict_layers"}
"""Second names of two keys (``MellumConfig.attribute_map``) -> the names in released folders.

`save_pretrained` of transformers writes the second names.
"""

_FIXED: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "per_layer_config": (None,),
    "mtp_per_layer_config": (None,),
    "mtp_hidden_states_first": (False, None),
    "logits_mup_width_multiplier": (None,),
    "unpadded_vocab_size": (None,),
}
"""Keys that change the arithmetic in transformers, with the only values that fit Mellum 2."""

_HARMLESS = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map
    chunk_size_feed_forward decoder_start_token_id do_sample dtype experts_implementation
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id license max_length
    max_new_tokens min_p model_type name_or_path num_labels output_attentions output_hidden_states
    output_router_logits problem_type repetition_penalty return_dict sep_token_id temperature
    tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version use_cache
    """.split()
)
"""Keys without effect on the arithmetic, ignored without a warning."""

_ROPE_KEYS = frozenset(
    """
    rope_type type rope_theta factor original_max_position_embeddings beta_fast beta_slow
    attention_factor mscale mscale_all_dim truncate partial_rotary_factor
    """.split()
)
"""Keys of one entry of ``rope_parameters`` that transformers reads."""


def from_hf_config(config: Mapping[str, Any]) -> Mellum2Architecture:
    """Read the content of a Hugging Face ``config.json``.

    Raises:
        InputError: another ``model_type``, or a value that no released model can have: tied
            embeddings, biases, another activation, an unknown RoPE type, more than one MTP layer,
            a malformed number.
    """
    require(
        isinstance(config, Mapping),
        f"config of type {type(config).__name__}",
        rule="config.json holds one object",
        fix="check the file",
    )
    model_type = config.get("model_type")
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and "MellumForCausalLM" in architectures
    require(
        model_type == "mellum" or (model_type is None and named),
        f"model_type={model_type!r}",
        rule="only model_type 'mellum' (MellumForCausalLM) is the Mellum 2 architecture",
        fix="give a folder of the Mellum 2 family",
    )
    values = _without_aliases(config)
    _require_fixed_values(values)
    fields = {name: values.get(name, default) for name, default in _DEFAULTS.items()}
    for name in ("router_aux_loss_coef", "rms_norm_eps", "initializer_range"):
        fields[name] = _as_float(fields[name])
    if isinstance(fields["eos_token_id"], list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])

    # Checked before the rest: the default of every absent list below takes its length from it.
    layers = fields["num_hidden_layers"]
    require_positive_int("num_hidden_layers", layers, most=LARGEST["num_hidden_layers"])
    fields["layer_types"] = _layer_types(values, "layer_types", "full_attention", layers)
    mlps = _layer_types(values, "mlp_layer_types", "sparse", layers)
    _require_length("mlp_layer_types", mlps, layers)
    fields["mlp_layer_types"] = () if set(mlps) == {"sparse"} else mlps
    mtp_layers = values.get("num_nextn_predict_layers") or 0  # null means none
    fields["num_mtp_layers"], fields["mtp_layer_types"] = mtp_layers, ()
    # A folder that lost its MTP head keeps the head's lists; transformers ignores them too.
    if mtp_layers:
        require_positive_int("num_mtp_layers", mtp_layers)
        fields["mtp_layer_types"] = _layer_types(
            values, "mtp_layer_types", "sliding_attention", mtp_layers
        )
    fields.update(_rope_fields(values, fields))
    architecture = Mellum2Architecture(**fields)
    require_hf_form(architecture)
    if mtp_layers:
        _require_mtp_mlps(values, architecture)
    _warn_of_oddities(values, architecture)
    return architecture


def to_hf_config(
    architecture: Mellum2Architecture, torch_dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Return ``config.json`` as released for ``architecture``, keys sorted as by transformers.

    Args:
        architecture: the model.
        torch_dtype: dtype of the weights, default ``bfloat16``.

    Raises:
        InputError: a model that `MellumForCausalLM` cannot hold.
    """
    require_hf_form(architecture)
    config: dict[str, Any] = {name: getattr(architecture, name) for name in _DEFAULTS}
    # The released files leave out ids that the model does not have.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config[name] is None:
            del config[name]
    if isinstance(architecture.eos_token_id, tuple):
        config["eos_token_id"] = list(architecture.eos_token_id)
    config |= {
        "architectures": ["MellumForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": torch_dtype,  # transformers 5's name of torch_dtype
        "hidden_act": "silu",
        "layer_types": list(architecture.layer_types),
        "mlp_layer_types": [
            architecture.mlp_type(layer) for layer in range(architecture.num_hidden_layers)
        ],
        "model_type": "mellum",
        "output_router_logits": False,
        "rope_parameters": {
            "full_attention": _rope_entry(architecture.rope_full_attention),
            "sliding_attention": _rope_entry(architecture.rope_sliding_attention),
        },
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if not (
        architecture.rope_full_attention.truncate and architecture.rope_sliding_attention.truncate
    ):
        # transformers reads it beside the layer types, not inside them: see `_rope_fields`.
        config["rope_parameters"]["truncate"] = False
    if architecture.num_mtp_layers:
        config["num_nextn_predict_layers"] = architecture.num_mtp_layers
        config["mtp_layer_types"] = list(architecture.mtp_layer_types)
        config["mtp_mlp_layer_types"] = [architecture.mtp_mlp_type] * architecture.num_mtp_layers
    return dict(sorted(config.items()))


def require_hf_form(architecture: Mellum2Architecture) -> None:
    """Refuse a variant of the model that Hugging Face's `MellumForCausalLM` cannot hold.

    Raises:
        InputError: the model has a shared expert, latent attention, or more than one MTP layer.
    """
    if architecture.num_mtp_layers > 1:
        raise InputError(
            f"architecture.num_mtp_layers={architecture.num_mtp_layers}",
            rule="transformers' MellumConfig takes at most one multi-token-prediction layer",
            fix="use `mellum2 score` on the checkpoint, or train with one layer",
        )
    if architecture.shared_expert_intermediate_size is not None:
        raise InputError(
            "architecture.shared_expert_intermediate_size="
            f"{architecture.shared_expert_intermediate_size}",
            rule="transformers' MellumForCausalLM has no shared expert, so config.json cannot "
            "describe this model",
            fix="use `mellum2 score` on the checkpoint, or train without a shared expert",
        )
    if (latent := architecture.latent_attention) is not None:
        raise InputError(
            f"architecture.latent_attention with kv_lora_rank={latent.kv_lora_rank}",
            rule="transformers' MellumForCausalLM has grouped queries only, so config.json cannot "
            "describe this model",
            fix="use `mellum2 score` on the checkpoint, or train without latent attention",
        )


def _without_aliases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with one spelling for each key.

    Raises:
        InputError: both spellings are given, with different values.
    """
    values = dict(config)
    for alias, name in _ALIASES.items():
        if alias not in values:
            continue
        value = values.pop(alias)
        # null and 0 both mean no layers (num_mtp_layers).
        if name in values and (values[name] or 0) != (value or 0):
            raise InputError(
                f"{alias}={value!r} beside {name}={values[name]!r}",
                rule="they are two names of one number",
                fix=f"keep the right one as {name}",
            )
        values[name] = value
    return values


def _require_fixed_values(values: Mapping[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise InputError(
                f"{name}={values[name]!r}",
                rule=f"a Mellum 2 model has {name}={allowed[0]!r}",
                fix="convert a folder of the Mellum 2 family; this one computes something else",
            )
    if "chain_hidden_post_norm" in values:
        raise InputError(
            f"chain_hidden_post_norm={values['chain_hidden_post_norm']!r}",
            rule="its presence takes the norm out of transformers' MTP layer",
            fix="remove the key: Mellum 2's MTP layer has its own final norm",
        )
    if values.get("rope_parameters") is None and values.get("rope_theta") is not None:
        raise InputError(
            f"rope_theta={values['rope_theta']!r} without rope_parameters",
            rule="transformers' MellumConfig ignores a top-level rope_theta "
            "and takes its own defaults",
            fix="write rope_parameters with one entry per layer type",
        )


def _layer_types(
    values: Mapping[str, Any], name: str, default: str, layers: Any
) -> tuple[Any, ...]:
    """Return the list of layer types under ``name``; if absent, ``default`` for every layer."""
    given = values.get(name)
    if given is None:
        # A malformed number of layers is left to the checks of Mellum2Architecture.
        fits = is_int(layers) and layers <= LARGEST["num_hidden_layers"]
        return (default,) * (layers if fits else 0)
    if not isinstance(given, list | tuple) or not all(isinstance(kind, str) for kind in given):
        raise InputError(
            f"{name}={given!r}",
            rule="it must be a list of names, one per layer",
            fix=f"list {name}",
        )
    return tuple(given)


def _require_mtp_mlps(values: Mapping[str, Any], architecture: Mellum2Architecture) -> None:
    """Refuse MTP layers with another MLP than the field `mtp_mlp_type`."""
    name, expected = "mtp_mlp_layer_types", architecture.mtp_mlp_type
    types = _layer_types(values, name, "sparse", architecture.num_mtp_layers)
    _require_length(name, types, architecture.num_mtp_layers)
    for layer, kind in enumerate(types):
        if kind != expected:
            raise InputError(
                f"{name}[{layer}]={kind!r}",
                rule=f"it is {expected!r} beside this trunk: 'dense' only if all of it is",
                fix=f"convert a folder whose MTP layer is {expected}",
            )


def _require_length(name: str, types: tuple[Any, ...], layers: int) -> None:
    if len(types) != layers:
        raise InputError(
            f"{name} with {len(types)} entries",
            rule="it must have one entry per layer",
            fix=f"give {layers} entries",
        )


def _rope_fields(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, RopeParameters]:
    """Read ``rope_parameters``; only a layer type that no layer has may lack its entry.

    ``truncate`` is read beside the entries, not inside them, as transformers does
    (``modeling_rope_utils.py``: ``config.rope_parameters.get("truncate", True)``, 5.23).
    """
    given = values.get("rope_parameters")
    given = _DEFAULT_ROPE if given is None else given
    if not isinstance(given, Mapping) or not any(kind in given for kind in _DEFAULT_ROPE):
        raise InputError(
            f"rope_parameters={given!r}",
            rule="Mellum 2 needs one entry per layer type, "
            "and transformers' MellumModel fails without them",
            fix="nest it: {'full_attention': {...}, 'sliding_attention': {...}}",
        )
    unknown = sorted(set(given) - set(_DEFAULT_ROPE) - {"truncate", *_ROPE_KEYS})
    if unknown:
        raise InputError(
            f"rope_parameters[{unknown[0]!r}]",
            rule="its entries are layer types",
            fix=nearest(unknown[0], _DEFAULT_ROPE),
        )
    # Keys of the older form, one rotation for all layers; transformers reads only the entries.
    if set(given) & _ROPE_KEYS - {"truncate"}:
        logger.warning(
            "rope_parameters: ignoring %s beside the layer types", sorted(set(given) & _ROPE_KEYS)
        )
    # An entry may be missing if no layer has its type; the field then takes the default.
    used = {*fields["layer_types"], *fields["mtp_layer_types"]}
    ropes = {}
    for kind, default in _DEFAULT_ROPE.items():
        entry = given.get(kind)
        if entry is None and kind in used:
            raise InputError(
                f"rope_parameters without {kind!r}",
                rule=f"the model has {kind} layers",
                fix=f"add the {kind!r} entry",
            )
        ropes[f"rope_{kind}"] = _read_rope(
            default if entry is None else entry,
            kind,
            given.get("truncate", True),
            fields["max_position_embeddings"],
        )
    return ropes


def _read_rope(
    entry: Any, kind: str, truncate: Any, max_position_embeddings: Any
) -> RopeParameters:
    where = f"rope_parameters.{kind}"
    if not isinstance(entry, Mapping):
        raise InputError(
            f"{where}={entry!r}", rule="it must be an object", fix="give rope_type and rope_theta"
        )
    rope_type = entry.get("rope_type", entry.get("type", "default"))  # "type": older transformers
    if entry.get("partial_rotary_factor") not in (None, 1):
        raise InputError(
            f"{where}.partial_rotary_factor={entry['partial_rotary_factor']!r}",
            rule="Mellum 2 rotates whole heads",
            fix="convert a folder with partial_rotary_factor 1",
        )
    # Collected over the branches below, so that one warning names all ignored keys.
    ignored = sorted(set(entry) - _ROPE_KEYS)
    theta = entry.get("rope_theta")
    if theta is None:
        raise InputError(
            f"{where} without rope_theta",
            rule="transformers needs it per layer type",
            fix="add e.g. 500000.0",
        )
    if rope_type != "yarn":
        ignored += sorted(
            set(entry) & _ROPE_KEYS - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        )
        rope = RopeParameters(rope_type=rope_type, rope_theta=_as_float(theta))
    else:
        if "factor" not in entry or entry.get("original_max_position_embeddings") is None:
            raise InputError(
                f"{where} of type yarn",
                rule="it needs factor and original_max_position_embeddings",
                fix="add both",
            )
        if entry.get("truncate", truncate) != truncate:
            ignored.append("truncate")
        original = entry["original_max_position_embeddings"]
        require_positive_int(f"{where}.original_max_position_embeddings", original)
        factor = entry["factor"]
        if factor is None:  # DeepSeek-V3 writes null; transformers then divides the two lengths
            require_positive_int("max_position_embeddings", max_position_embeddings)
            factor = max_position_embeddings / original
        rope = RopeParameters(
            rope_type="yarn",
            rope_theta=_as_float(theta),
            factor=_as_float(factor),
            original_max_position_embeddings=original,
            # `or`: transformers takes its defaults for 0 and null alike.
            beta_fast=_as_float(entry.get("beta_fast") or 32),
            beta_slow=_as_float(entry.get("beta_slow") or 1),
            attention_factor=_as_float(entry.get("attention_factor")),
            mscale=_as_float(entry.get("mscale") or None),
            mscale_all_dim=_as_float(entry.get("mscale_all_dim") or None),
            truncate=truncate,
        )
    if ignored:
        logger.warning("%s: ignoring %s, as transformers does", where, ", ".join(ignored))
    return rope


def _rope_entry(rope: RopeParameters) -> dict[str, Any]:
    entry: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.rope_type == "yarn":
        entry |= {
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                entry[name] = getattr(rope, name)
    return entry


def _as_float(value: Any) -> Any:
    """Return an int as a float, since JSON may hold 500000.0 as either.

    Any other value is returned unchanged and left to the checks of `Mellum2Architecture`.
    """
    return float(value) if is_int(value) else value


def _warn_of_oddities(values: Mapping[str, Any], architecture: Mellum2Architecture) -> None:
    """Warn of unknown keys, and of token ids outside the vocabulary; transformers accepts both."""
    read = {
        *_DEFAULTS,
        *_FIXED,
        *_HARMLESS,
        "num_nextn_predict_layers",
        "rope_parameters",
        "rope_theta",
    }
    read |= {"layer_types", "mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types"}
    unknown = sorted(set(values) - read)
    if unknown:
        logger.warning(
            "config.json: ignoring keys that Mellum 2 does not have: %s", ", ".join(unknown)
        )
    ids = {
        name: getattr(architecture, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for name, value in ids.items():
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < architecture.vocab_size:
                logger.warning(
                    "config.json: %s=%d is not in the vocabulary of %d",
                    name,
                    token,
                    architecture.vocab_size,
                )
