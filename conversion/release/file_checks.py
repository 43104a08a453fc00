"""The checks of a release folder that need no model: config, weights as stored, manifest, hashes,
documents.

What a file says is compared with what another says; `conversion.release.tokenizer_checks` does the
same for the tokenizer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.huggingface.folder import (
    CONFIG_FILE,
    PICKLED,
    HfFolder,
    StoredTensor,
    check_inside,
    check_names,
    check_shapes,
    dtype_name,
    listed,
    one_dtype,
    present_fused,
    read_config,
    read_headers,
    read_json,
)
from conversion.jobs.weights_manifest import MANIFEST_FILE, Manifest, WeightRecord
from conversion.mapping import derive, huggingface_shapes
from conversion.release.check import Check
from conversion.release.members import BASE_PRETRAIN, CHAT_MEMBERS, MEMBERS
from mellum2_megatron.architecture import Mellum2Architecture, RopeParameters
from mellum2_megatron.common.errors import InputError

CARD_FILE = "README.md"
LICENSE_FILE = "LICENSE"
VERIFICATION_FILE = "verification.json"
SHORTEST_CARD = 200  # characters: a card below this says nothing about a model

_NEEDS_CONFIG = "needs a config.json that can be read"
_NEEDS_WEIGHTS = "needs weight files that can be read"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The folder's tensors as stored, and the architecture they would fit: the config's, with MTP
    as it is present."""

    tensors: dict[str, StoredTensor]
    architecture: Mellum2Architecture


def static_checks(folder: Path, member: str | None) -> list[Check]:
    """Every check that does not load the model."""
    from conversion.release.tokenizer_checks import tokenizer_checks

    checks = [_check("nothing executable", lambda: _nothing_executable(folder))]
    config, architecture = _config(folder)
    checks.append(config)
    if architecture is None:
        names = ("layer types", "rope", "context")
        checks += [Check.not_applicable(name, _NEEDS_CONFIG) for name in names]
    else:
        found = architecture
        checks.append(_check("layer types", lambda: _layer_types(folder, found)))
        checks.append(_check("rope", lambda: _rope(folder, found)))
        checks.append(_check("context", lambda: context_check(found, member)))
    checks += _weights_checks(folder, architecture)
    checks += tokenizer_checks(folder, architecture, chat=member in CHAT_MEMBERS)
    checks.append(_model_card(folder))
    checks.append(_licence(folder))
    checks.append(_check("verification card", lambda: _verification(folder)))
    return checks


def stated_member(folder: Path) -> str | None:
    """The family member that the folder's verification card names, if there is one."""
    try:
        stated = read_json(folder / VERIFICATION_FILE, "").get("member")
    except InputError:
        return None
    return stated if stated in MEMBERS else None


def _check(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except InputError as error:
        return Check.refused(name, error)


# -- config -----------------------------------------------------------------------------------------------------------


def _nothing_executable(folder: Path) -> Check:
    name = "nothing executable"
    files = sorted(
        str(file.relative_to(folder))
        for pattern in (*PICKLED, "*.py")
        for file in folder.rglob(pattern)
    )
    if files:
        return Check.failed(
            name, listed(files), rule="pickles and Python files can run code where the folder is loaded",
            fix="remove them; weights are released as safetensors",
        )  # fmt: skip
    for file in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        check_inside(folder, file)
    for json_name in (CONFIG_FILE, "tokenizer_config.json"):
        path = folder / json_name
        if path.is_file() and "auto_map" in read_json(path, ""):
            return Check.failed(
                name, f"auto_map in {json_name}", rule="it asks the loader to run code from the folder",
                fix="remove the key: transformers knows Mellum",
            )  # fmt: skip
    return Check.passed(name, "no pickles, no code")


def _config(folder: Path) -> tuple[Check, Mellum2Architecture | None]:
    try:
        architecture = read_config(folder)
    except InputError as error:
        return Check.refused("config", error), None
    value = f"Mellum 2, {architecture.num_hidden_layers} layers, {architecture.num_parameters():,} parameters"
    return Check.passed("config", value), architecture


def _layer_types(folder: Path, architecture: Mellum2Architecture) -> Check:
    config = read_json(folder / CONFIG_FILE, "")
    absent = [name for name in ("layer_types", "sliding_window") if config.get(name) is None]
    full = architecture.layer_types.count("full_attention")
    if "layer_types" in absent or (
        "sliding_window" in absent and full < len(architecture.layer_types)
    ):
        return Check.failed(
            "layer types", f"{listed(absent)} absent from {CONFIG_FILE}",
            rule="readers differ in what an absent key means (transformers: every layer full)",
            fix="write the keys out, one type a layer",
        )  # fmt: skip
    sliding = len(architecture.layer_types) - full
    return Check.passed(
        "layer types", f"{sliding} sliding (window {architecture.sliding_window}), {full} full"
    )


def _rope(folder: Path, architecture: Mellum2Architecture) -> Check:
    name = "rope"
    written = read_json(folder / CONFIG_FILE, "").get("rope_parameters")
    used = sorted({*architecture.layer_types, *architecture.mtp_layer_types})
    absent = [
        kind
        for kind in used
        if not isinstance(written, dict) or not isinstance(written.get(kind), dict)
    ]
    if absent:
        return Check.failed(
            name, f"rope_parameters without {listed(absent)}",
            rule="each layer type has its own; transformers' default base for sliding layers is 10,000",
            fix="write rope_type and rope_theta of each layer type",
        )  # fmt: skip
    if architecture.rope_sliding_attention.rope_type != "default":
        return Check.failed(
            name, f"sliding_attention: rope_type={architecture.rope_sliding_attention.rope_type!r}",
            rule="YaRN touches the full-attention layers only",
            fix='use {"rope_type": "default", "rope_theta": ...} there',
        )  # fmt: skip
    return _yarn(architecture.rope_full_attention, architecture.max_position_embeddings)


def _yarn(rope: RopeParameters, context: int) -> Check:
    name = "rope"
    if rope.rope_type == "default":
        return Check.passed(name, f"default in every layer, theta {rope.rope_theta:,.0f}")
    assert rope.factor is not None
    if rope.original_max_position_embeddings is None:
        return Check.failed(
            name, "full_attention: YaRN without original_max_position_embeddings",
            rule="the length it starts from must be told, not derived", fix="write the native context there (8192)",
        )  # fmt: skip
    if rope.factor * rope.original_max_position_embeddings != context:
        return Check.failed(
            name,
            f"max_position_embeddings={context}, YaRN from {rope.original_max_position_embeddings} by {rope.factor:g}",
            rule="the context is original_max_position_embeddings times factor",
            fix=f"set max_position_embeddings to {rope.factor * rope.original_max_position_embeddings:.0f}",
        )  # fmt: skip
    expected = 0.1 * math.log(rope.factor) + 1
    if rope.mscale is None and abs(rope.resolved_attention_factor - expected) > 1e-6:
        return Check.failed(
            name, f"full_attention: attention_factor={rope.attention_factor}",
            rule=f"YaRN by {rope.factor:g} scales by 0.1*ln(factor)+1 = {expected!r}",
            fix=f"set attention_factor to {expected!r}",
        )  # fmt: skip
    return Check.passed(
        name,
        f"YaRN x{rope.factor:g} in full layers, attention factor {expected:.6f}; default in sliding",
    )


def context_check(architecture: Mellum2Architecture, member: str | None) -> Check:
    """Has the member the context it was trained for: native for base-pretrain, extended by YaRN for
    all others?"""
    context, kind = architecture.max_position_embeddings, architecture.rope_full_attention.rope_type
    value = f"{context:,} tokens, full_attention rope_type {kind!r}"
    if member is None:
        return Check.not_applicable("context", f"{value}; give --member to compare with the family")
    if member == BASE_PRETRAIN and kind != "default":
        return Check.failed(
            "context", value, rule=f"{BASE_PRETRAIN} has its native context, without YaRN",
            fix="release it as base, or take the checkpoint before the long-context stage",
        )  # fmt: skip
    if member != BASE_PRETRAIN and kind != "yarn":
        return Check.failed(
            "context", value, rule=f"{member} comes after the long-context stage: YaRN in its full-attention layers",
            fix=f"release it as {BASE_PRETRAIN}, or train the long-context stage (mellum2_12b_long_context) first",
        )  # fmt: skip
    return Check.passed("context", value)


# -- weights ----------------------------------------------------------------------------------------------------------


def _weights_checks(folder: Path, architecture: Mellum2Architecture | None) -> list[Check]:
    later = ("tensors", "MTP head", "shapes", "dtypes", "finite", "manifest")
    try:
        tensors = read_headers(folder)
    except InputError as error:
        return [
            Check.refused("files", error),
            *(Check.not_applicable(name, _NEEDS_WEIGHTS) for name in later),
        ]
    count = len({tensor.file for tensor in tensors.values()})
    checks = [
        Check.passed(
            "files", f"{count} safetensors file{'s' * (count != 1)}, {len(tensors)} tensors"
        )
    ]
    if architecture is None:
        return [*checks, *(Check.not_applicable(name, _NEEDS_CONFIG) for name in later)]
    weights = Weights(tensors=tensors, architecture=_with_mtp_as_present(architecture, tensors))
    checks += [
        _check("tensors", lambda: _names(folder, weights)),
        _mtp(architecture, weights),
        _check("shapes", lambda: _shapes(folder, weights)),
        _check("dtypes", lambda: _dtypes(folder, weights)),
    ]
    if any(check.status == "fail" for check in checks):
        missing = "needs tensors that agree with config.json"
        return [
            *checks,
            Check.not_applicable("finite", missing),
            Check.not_applicable("manifest", missing),
        ]
    return [*checks, *_contents(folder)]


def _with_mtp_as_present(
    architecture: Mellum2Architecture, tensors: dict[str, StoredTensor]
) -> Mellum2Architecture:
    present = int(any(name.startswith("mtp.") for name in tensors))
    if present == architecture.num_mtp_layers:
        return architecture
    types = ("sliding_attention",) if present else ()
    return architecture.replace(num_mtp_layers=present, mtp_layer_types=types)


def _names(folder: Path, weights: Weights) -> Check:
    fused = present_fused(weights.architecture, weights.tensors)
    check_names(folder, derive(weights.architecture), weights.tensors, fused, weights.architecture)
    return Check.passed("tensors", f"{len(weights.tensors)} tensors, none missing, none extra")


def _mtp(architecture: Mellum2Architecture, weights: Weights) -> Check:
    announced, present = architecture.num_mtp_layers, weights.architecture.num_mtp_layers
    value = f"num_nextn_predict_layers={announced}, {present} in the tensors"
    if announced > present:
        return Check.failed(
            "MTP head", value, rule="an announced MTP head must be there (transformers' save_pretrained drops it)",
            fix="export again with its mtp.* tensors, or set num_nextn_predict_layers to 0",
        )  # fmt: skip
    if present > announced:
        return Check.failed(
            "MTP head", value, rule="an MTP head that is there must be announced, or nobody uses it",
            fix="set num_nextn_predict_layers to 1 and mtp_layer_types",
        )  # fmt: skip
    return Check.passed(
        "MTP head",
        f"announced and present: {present}" if present else "neither announced nor present",
    )


def _shapes(folder: Path, weights: Weights) -> Check:
    fused = present_fused(weights.architecture, weights.tensors)
    expected = huggingface_shapes(derive(weights.architecture))
    known = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name in expected or name in fused
    }
    check_shapes(folder, expected, known, fused)
    return Check.passed("shapes", "as config.json says")


def _dtypes(folder: Path, weights: Weights) -> Check:
    stored = dtype_name(one_dtype(folder, weights.tensors))
    config = read_json(folder / CONFIG_FILE, "")
    announced = config.get("dtype", config.get("torch_dtype"))
    if announced != stored:
        return Check.failed(
            "dtypes", f"dtype={announced!r} in {CONFIG_FILE}, tensors are {stored}",
            rule="loaders believe the config", fix=f"set dtype to {stored!r}",
        )  # fmt: skip
    return Check.passed("dtypes", stored)


def _contents(folder: Path) -> list[Check]:
    """Read every tensor once: are its values finite, and are they what the manifest says?"""
    try:
        manifest = Manifest.of_folder(folder)
    except InputError as error:
        return [*_contents_against(folder, None)[:1], Check.refused("manifest", error)]
    return _contents_against(folder, manifest)


def _contents_against(folder: Path, manifest: Manifest | None) -> list[Check]:
    bad: list[str] = []
    records: dict[str, WeightRecord] = {}
    try:
        with HfFolder.open(folder) as opened:
            names = [source.name for entry in opened.entries for source in entry.sources]
            for name in names:
                tensor = opened.tensor(name)
                wrong = int((~torch.isfinite(tensor)).sum())
                if wrong:
                    bad.append(f"{name} ({wrong} of {tensor.numel()})")
                if manifest is not None:
                    records[name] = WeightRecord.of(name, tensor)
    except InputError as error:
        return [Check.refused("finite", error), Check.not_applicable("manifest", _NEEDS_WEIGHTS)]
    finite = Check.passed("finite", f"every value of {len(names)} tensors")
    if bad:
        finite = Check.failed(
            "finite", f"NaN or infinity in {listed(bad)}", rule="weights are finite numbers",
            fix="release a checkpoint from before the training diverged, or export again",
        )  # fmt: skip
    if manifest is None:
        return [finite, Check.not_applicable("manifest", f"no {MANIFEST_FILE}")]
    return [finite, _against_manifest(manifest, records)]


def _against_manifest(manifest: Manifest, records: dict[str, WeightRecord]) -> Check:
    listed_records = manifest.records
    names = listed_records.keys() | records.keys()
    different = sorted(name for name in names if listed_records.get(name) != records.get(name))
    if different:
        return Check.failed(
            "manifest", listed(different), rule=f"weights are those whose hashes {MANIFEST_FILE} lists",
            fix="copy the weights again; if they were changed on purpose, export again",
        )  # fmt: skip
    return Check.passed("manifest", f"{len(records)} hashes match")


# -- documents
# --------------------------------------------------------------------------------------------------------


def _model_card(folder: Path) -> Check:
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if len(text) < SHORTEST_CARD:
        return Check.failed(
            "model card", f"{CARD_FILE}: {len(text)} characters", rule="a release says what it is and what it is for",
            fix=f"write {CARD_FILE}, or let `mellum2 release` write it",
        )  # fmt: skip
    return Check.passed("model card", f"{CARD_FILE}, {len(text):,} characters")


def _licence(folder: Path) -> Check:
    path = next((folder / name for name in (LICENSE_FILE, f"{LICENSE_FILE}.txt", f"{LICENSE_FILE}.md")
                 if (folder / name).is_file()), folder / LICENSE_FILE)  # fmt: skip
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "Apache License" not in text:
        return Check.failed(
            "licence", f"{path.name}: {'another text' if text else 'missing'}",
            rule="Mellum 2 and what derives from it are released under Apache 2.0, whose text goes along",
            fix="copy the text of the Apache License 2.0 into the folder as LICENSE",
        )  # fmt: skip
    return Check.passed("licence", f"{path.name}: Apache 2.0")


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the weights, which the manifest covers, and the two cards, which
    quote these hashes.

    Hidden files (a clone's ``.git``) are no part of a release.
    """
    hashes = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            hidden
            or not file.is_file()
            or file.suffix == ".safetensors"
            or file.name in (CARD_FILE, VERIFICATION_FILE)
        ):
            continue
        with file.open("rb") as stream:
            hashes[str(name)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _verification(folder: Path) -> Check:
    name, path = "verification card", folder / VERIFICATION_FILE
    if not path.exists():
        return Check.not_applicable(name, f"no {VERIFICATION_FILE}")
    stated: Any = read_json(path, "").get("files")
    if not isinstance(stated, dict):
        raise InputError(
            str(path), rule="it lists the hash of every file", fix="release the folder again"
        )
    actual = file_hashes(folder)
    different = sorted(
        file for file in stated if stated[file] != actual.get(file)
    )  # what hubs add is no concern
    if different:
        return Check.failed(
            name, listed(different), rule=f"files are those whose hashes {VERIFICATION_FILE} lists",
            fix="release the folder again after a change, or copy the files again",
        )  # fmt: skip
    return Check.passed(name, f"{len(stated)} files have the hashes it lists")
