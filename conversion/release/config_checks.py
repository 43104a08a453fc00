"""The checks of a release folder's config.json: model, layer types, RoPE, context length."""

from __future__ import annotations

import math
from pathlib import Path

from conversion.huggingface.folder import read_config
from conversion.huggingface.format import CONFIG_FILE, listed, read_json
from conversion.release.check import Check, named_check
from conversion.release.members import BASE_PRETRAIN
from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from mellum2_megatron.common.errors import InputError

NEEDS_CONFIG = "needs a config.json that can be read"


def config_checks(
    folder: Path, member: str | None
) -> tuple[list[Check], Mellum2Architecture | None]:
    """Return every check of config.json, and its architecture; None if it cannot be read."""
    outcome = config(folder)
    if outcome.status == "fail":
        later = (layer_types, rope, context)
        return [outcome, *(check.left_out(NEEDS_CONFIG) for check in later)], None
    architecture = read_config(folder)
    checks = [
        outcome,
        layer_types(folder, architecture),
        rope(folder, architecture),
        context(architecture, member),
    ]
    return checks, architecture


@named_check("config")
def config(folder: Path) -> str:
    """config.json describes a Mellum 2."""
    architecture = read_config(folder)
    layers, parameters = architecture.num_hidden_layers, architecture.num_parameters()
    return f"Mellum 2, {layers} layers, {parameters:,} parameters"


@named_check("layer types")
def layer_types(folder: Path, architecture: Mellum2Architecture) -> str:
    """Attention types and window are written out, not left to the defaults of a reader."""
    values = read_json(folder / CONFIG_FILE, "")
    full = architecture.layer_types.count("full_attention")
    sliding = len(architecture.layer_types) - full
    # A model without sliding layers needs no window.
    needed = ("layer_types", "sliding_window") if sliding else ("layer_types",)
    if any(values.get(key) is None for key in needed):
        absent = [key for key in ("layer_types", "sliding_window") if values.get(key) is None]
        raise InputError(
            f"{listed(absent)} absent from {CONFIG_FILE}",
            rule="readers differ in what an absent key means (transformers: every layer full)",
            fix="write the keys out, one type a layer",
        )
    return f"{sliding} sliding (window {architecture.sliding_window}), {full} full"


@named_check("rope")
def rope(folder: Path, architecture: Mellum2Architecture) -> str:
    """Each layer type has RoPE parameters of its own, YaRN in full-attention layers only."""
    written = read_json(folder / CONFIG_FILE, "").get("rope_parameters")
    by_type = written if isinstance(written, dict) else {}
    # The MTP layer's type may occur in no layer of the trunk.
    used = sorted({*architecture.layer_types, *architecture.mtp_layer_types})
    absent = [kind for kind in used if not isinstance(by_type.get(kind), dict)]
    if absent:
        raise InputError(
            f"rope_parameters without {listed(absent)}",
            rule="each layer type has its own; "
            "transformers' default base for sliding layers is 10,000",
            fix="write rope_type and rope_theta of each layer type",
        )
    sliding, full = architecture.rope_sliding_attention, architecture.rope_full_attention
    if sliding.rope_type != "default":
        raise InputError(
            f"sliding_attention: rope_type={sliding.rope_type!r}",
            rule="YaRN touches the full-attention layers only",
            fix='use {"rope_type": "default", "rope_theta": ...} there',
        )
    if full.rope_type == "default":
        return f"default in every layer, theta {full.rope_theta:,.0f}"
    return _require_yarn(full, architecture.max_position_embeddings)


def _require_yarn(yarn: RopeParameters, max_positions: int) -> str:
    """Return the value of the rope check for YaRN in the full-attention layers.

    Raises:
        InputError: the context or the attention factor does not follow from YaRN's factor.
    """
    factor, native = yarn.factor, yarn.original_max_position_embeddings
    assert factor is not None
    if native is None:
        raise InputError(
            "full_attention: YaRN without original_max_position_embeddings",
            rule="readers assume different lengths for YaRN to start from",
            fix="write the native context there (8192)",
        )
    if factor * native != max_positions:
        raise InputError(
            f"max_position_embeddings={max_positions}, YaRN from {native} by {factor:g}",
            rule="the context is original_max_position_embeddings times factor",
            fix=f"set max_position_embeddings to {factor * native:.0f}",
        )
    # With mscale another formula gives the default (transformers/modeling_rope_utils.py,
    # `get_mscale`, 5.23).
    expected = 0.1 * math.log(factor) + 1
    if yarn.mscale is None and abs(yarn.resolved_attention_factor - expected) > 1e-6:
        raise InputError(
            f"full_attention: attention_factor={yarn.attention_factor}",
            rule=f"YaRN by {factor:g} scales by 0.1*ln(factor)+1 = {expected!r}",
            fix=f"set attention_factor to {expected!r}",
        )
    return f"YaRN x{factor:g} in full layers, attention factor {expected:.6f}; default in sliding"


@named_check("context")
def context(architecture: Mellum2Architecture, member: str | None) -> str | Check:
    """The context is the member's: native for base-pretrain, extended by YaRN for all others."""
    kind = architecture.rope_full_attention.rope_type
    value = f"{architecture.max_position_embeddings:,} tokens, full_attention rope_type {kind!r}"
    if member is None:
        return context.left_out(f"{value}; give --member to compare with the family")
    if member == BASE_PRETRAIN and kind != "default":
        raise InputError(
            value,
            rule=f"{BASE_PRETRAIN} has its native context, without YaRN",
            fix="release it as base, or take the checkpoint before the long-context stage",
        )
    if member != BASE_PRETRAIN and kind != "yarn":
        raise InputError(
            value,
            rule=f"{member} comes after the long-context stage: YaRN in its full-attention layers",
            fix=f"release it as {BASE_PRETRAIN}, or train the long-context stage first "
            "(mellum2_12b_long_context)",
        )
    return value
