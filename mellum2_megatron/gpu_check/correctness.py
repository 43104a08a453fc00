"""Pieces that compare: training with and without an interruption, backends, precisions, formats.

They share one small model. On a GPU it has the 12B's widths, 4 layers, 16 experts and a vocabulary
of 8,192: its kernels see the 12B's shapes, and a checkpoint takes 7 GB.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import iteration_folder_name, write_tracker
from mellum2_megatron.common.files import remove_directory
from mellum2_megatron.gpu_check.piece import Outcome, PieceError, SkipPiece, Workplace
from mellum2_megatron.metrics import read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE

STEPS, SAVED = 4, 2
"""Steps of a training run, and the step of the checkpoint that another run resumes."""

_SAMPLES = 4  # sequences a step and rank

DETERMINISTIC = "execution.deterministic=true"
"""Megatron's deterministic mode, of one piece on GPUs and of all runs of a rehearsal."""

_DIFFERENCE = "largest relative difference"

LOSSES = ("lm_loss", "mtp_loss", "aux_loss", "z_loss")

RESUMED_SHARE = 1e-3
"""Largest relative difference of a loss after a resume. Kernels on a GPU add in varying order."""

BACKEND_SHARE = 5e-3
"""Largest relative difference of a loss between backends in BF16, which has 8 bits."""

FP8_SHARE = 2e-2
"""Largest relative difference of a loss between FP8, which has 3 or 4 bits, and BF16."""

NORM_FACTOR = 10
"""A gradient norm may differ by this many times what a loss may."""

LOGIT_FACTOR = 1.5
"""Largest error of te's BF16 logits against float32, in errors of torch's BF16 logits."""


def prepare_data(place: Workplace) -> Outcome:
    """Make a small corpus of the Python sources installed here, packed as recipes' data are."""
    length, vocabulary = (256, 1024) if place.rehearsal else (2048, 8192)
    start = time.monotonic()
    _remove(place.work / "data")
    place.mellum2(
        "data",
        *("data", "prepare", "--output", str(place.work / "data"), "--no-filters"),
        *("--max-megabytes", "1" if place.rehearsal else "4", "--valid-fraction", "0.2"),
        *("--vocab-size", str(vocabulary), "--sequence-length", str(length)),
    )
    return Outcome(status="passed", figures={"seconds": time.monotonic() - start})


def train(place: Workplace) -> Outcome:
    """Train a few steps with the backend of GPUs, in BF16, and save twice."""
    run = _train(place, "straight")
    losses = _losses(run, range(1, STEPS + 1))
    return Outcome(status="passed", figures={"losses": losses, **_size(run)})


def resume(place: Workplace) -> Outcome:
    """Resume from the first checkpoint; the steps after it must repeat."""
    return _resume(place, "straight")


def _resume(place: Workplace, name: str, *overrides: str) -> Outcome:
    """Resume a run from its first checkpoint in another folder, and compare the steps after it."""
    resumed = _train_resumed(place, name, *overrides)
    outcome = _compare(place.work / name, resumed, range(SAVED + 1, STEPS + 1), RESUMED_SHARE)
    _remove(resumed)
    return outcome


def _train_resumed(place: Workplace, name: str, *overrides: str, ranks: int = 1) -> Path:
    """Resume a run from its first checkpoint in another folder, and return that folder."""
    straight, resumed = place.work / name, place.work / "resumed"
    _remove(resumed)
    later = {METRICS_FILE, iteration_folder_name(STEPS), "loss.png", "provenance.jsonl"}
    shutil.copytree(
        straight, resumed, ignore=lambda _, names: later & set(names), copy_function=os.link
    )
    write_tracker(resumed, SAVED)
    return _train(place, "resumed", *overrides, ranks=ranks)


def deterministic(place: Workplace) -> Outcome:
    """Train in Megatron's deterministic mode on all GPUs, again, and resumed: equal to the bit.

    Losses, weights and optimizer state are compared. On 2, 4 or 8 GPUs the ranks share experts and
    data, so exchanges and reductions are in it. All runs of a rehearsal are in this mode: there a
    second run is compared with that of `train`, and `resume` has resumed it.
    """
    if place.deterministic_lacks is not None:
        raise SkipPiece(place.deterministic_lacks)
    ranks = min(8, 1 << (max(1, place.gpus).bit_length() - 1))
    figures = {}
    if place.rehearsal:
        first = place.work / "straight"
    else:
        first = _train(place, "deterministic", DETERMINISTIC, ranks=ranks)
        resumed = _train_resumed(place, first.name, DETERMINISTIC, ranks=ranks)
        figures["resumed"] = _differing_shares(first, resumed, range(SAVED + 1, STEPS + 1))
        _remove(resumed)
    once = f"checkpoint.save_interval={STEPS}"
    again = _train(place, "again", DETERMINISTIC, once, ranks=ranks)
    figures["run again"] = _differing_shares(first, again, range(1, STEPS + 1))
    _remove(again)
    if not place.rehearsal:
        _remove(first)
    wrong = [
        f"{what}: {value} differs"
        for what, values in figures.items()
        for value, difference in values.items()
        if difference != 0
    ]
    told = "does not repeat every bit" if wrong else "repeats every bit, resumed too,"
    line = f"`execution.deterministic`: true {told} on {ranks} GPU(s)"
    return Outcome(
        status="failed" if wrong else "passed",
        reason="; ".join(wrong),
        figures=figures,
        decides=() if place.rehearsal else (line,),
    )


def _differing_shares(one: Path, other: Path, steps: Any) -> dict[str, float]:
    """Return the differences of two runs that should be equal, by name; 0 means every bit.

    Of losses and the gradient norm they are relative. Of the last checkpoint's tensors, weights
    and optimizer state, it is the share of those that differ.
    """
    differences, _ = compare_losses(_losses(one, steps), _losses(other, steps), 0.0)
    last = iteration_folder_name(STEPS)
    differing, count = differing_tensors(one / last, other / last)
    return differences | {"share of stored tensors": len(differing) / count}


def differing_tensors(one: Path, other: Path) -> tuple[list[str], int]:
    """Compare two checkpoints of equal layout chunk by chunk, weights and optimizer state.

    Args:
        one, other: folders of a step, such as ``iter_0000004``.

    Returns:
        Names of tensors that differ in a bit, and the number of all tensors.

    Raises:
        PieceError: one has a chunk that the other lacks, or no tensors at all.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from mellum2_megatron.checkpoint.safe_metadata import read_metadata

    chunks = []
    for folder in (one, other):
        metadata = read_metadata(folder)
        chunks.append(
            {
                (index.fqn, index.offset): info
                for index, info in metadata.storage_data.items()
                if isinstance(metadata.state_dict_metadata[index.fqn], TensorStorageMetadata)
            }
        )
    if not chunks[0] or chunks[0].keys() != chunks[1].keys():
        raise PieceError(f"{one} and {other} hold different tensors, or none")
    differing = {
        key[0]
        for key, info in chunks[0].items()
        if _chunk(one, info) != _chunk(other, chunks[1][key])
    }
    return sorted(differing), len({name for name, _ in chunks[0]})


def _chunk(folder: Path, info: Any) -> bytes:
    """Return a chunk as it is stored: an archive of `torch.save`, equal for equal values."""
    with (folder / info.relative_path).open("rb") as stream:
        stream.seek(info.offset)
        data: bytes = stream.read(info.length)
    return data


def export(place: Workplace) -> Outcome:
    """Export the checkpoint to Hugging Face's format, and compare the logits of both in float32."""
    run, hf = place.work / "straight", place.work / "hf"
    place.mellum2(
        "export",
        *("convert", "export", "--megatron-path", str(run), "--hf-path", str(hf), "--overwrite"),
    )
    report = place.mellum2(
        "verify",
        *("verify", "--megatron-path", str(run), "--hf-path", str(hf), "--device", _device(place)),
    )
    lines = [line.strip() for line in report.splitlines() if "logits" in line]
    return Outcome(status="passed", figures={"verify": lines})


def logits(place: Workplace) -> Outcome:
    """Compare logits of the two backends in BF16 with those of torch in float32.

    The error of te may be `LOGIT_FACTOR` of torch's own. Without te only torch's is measured.
    """
    import numpy as np

    run, tokens = place.work / "straight", place.work / "tokens.npy"
    vocabulary = find_checkpoint(run).architecture.vocab_size
    np.save(tokens, np.random.default_rng(7).integers(0, vocabulary, (2, 512)))
    exact = _score(place, run, tokens, "torch", "float32")
    backends = ("torch",) if place.rehearsal else ("torch", "te")
    errors = {
        backend: logit_errors(exact, _score(place, run, tokens, backend, "bfloat16"))
        for backend in backends
    }
    figures: dict[str, Any] = {f"{backend} in BF16": error for backend, error in errors.items()}
    allowed = {head: LOGIT_FACTOR * error for head, error in errors["torch"].items()}
    wrong = [
        f"{backend}: {head} off by {error:.2g}, allowed {allowed[head]:.2g}"
        for backend, heads in errors.items()
        for head, error in heads.items()
        if not error <= allowed[head]
    ]
    return Outcome(status="failed" if wrong else "passed", reason="; ".join(wrong), figures=figures)


def logit_errors(exact: Path, rounded: Path) -> dict[str, float]:
    """Return the relative error of each head's logits: the median over positions.

    A router with rounded scores may choose other experts for a few tokens. The median leaves these
    tokens out. MTP's last position is undefined.
    """
    import numpy as np

    errors = {}
    with np.load(exact) as one, np.load(rounded) as other:
        for head in one.files:
            end = -1 if head == "mtp_logits" else None
            reference = one[head][:, :end].astype(np.float64)
            difference = np.linalg.norm(other[head][:, :end] - reference, axis=-1)
            errors[head] = float(np.median(difference / np.linalg.norm(reference, axis=-1)))
    return errors


def backends(place: Workplace) -> Outcome:
    """Train with the torch backend too: losses and gradient norms must agree with te's."""
    if place.rehearsal:
        raise SkipPiece("a rehearsal has the torch backend only")
    run = _train(place, "torch", "backend=torch", f"checkpoint.save_interval={STEPS}")
    outcome = _compare(place.work / "straight", run, [1, 2], BACKEND_SHARE)
    _remove(run)
    return outcome


def fp8(place: Workplace) -> Outcome:
    """Train in FP8 too, save and resume: compare with BF16, and the resumed steps with FP8's."""
    if place.rehearsal:
        raise SkipPiece("FP8 needs a GPU")
    if place.machine["fp8"] is not None:
        raise SkipPiece(place.machine["fp8"])
    in_fp8 = "precision.compute=fp8"
    run = _train(place, "fp8", in_fp8)
    against = {
        "BF16": _compare(place.work / "straight", run, [1, 2], FP8_SHARE),
        "resumed": _resume(place, "fp8", in_fp8),
    }
    _remove(run)
    wrong = [f"{name}: {one.reason}" for name, one in against.items() if one.status == "failed"]
    return Outcome(
        status="failed" if wrong else "passed",
        reason="; ".join(wrong),
        figures={name: one.figures[_DIFFERENCE] for name, one in against.items()},
        decides=("`precision.compute`: bf16, until piece fp8 passes",) if wrong else (),
    )


def compare_losses(
    one: dict[int, dict[str, float]], other: dict[int, dict[str, float]], share: float
) -> tuple[dict[str, float], list[str]]:
    """Compare losses and gradient norms of two runs.

    Args:
        one, other: values by step and name, as `_losses` returns them.
        share: largest relative difference of a loss; of a gradient norm `NORM_FACTOR` times that.

    Returns:
        Largest relative difference by name, and a line for each that is too large.
    """
    differences: dict[str, float] = {}
    for step, values in one.items():
        for name, value in values.items():
            found = abs(other[step][name] - value) / max(abs(value), 1e-12)
            known = differences.get(name, 0.0)
            # A difference that is not a number stays: it compares as false with every other.
            differences[name] = known if found <= known or math.isnan(known) else found
    allowed = {name: share * (NORM_FACTOR if name == "grad_norm" else 1) for name in differences}
    wrong = [
        f"{name} differs by {found:.2g} of its value, allowed {allowed[name]:.2g}"
        for name, found in differences.items()
        if not found <= allowed[name]
    ]
    return differences, wrong


def _compare(one: Path, other: Path, steps: Any, share: float) -> Outcome:
    """Compare two runs' losses at some steps."""
    first, second = _losses(one, steps), _losses(other, steps)
    differences, wrong = compare_losses(first, second, share)
    return Outcome(
        status="failed" if wrong else "passed",
        reason="; ".join(wrong),
        figures={_DIFFERENCE: differences},
    )


def _losses(run: Path, steps: Any) -> dict[int, dict[str, float]]:
    """Return losses and gradient norm of a run, by step and name.

    Raises:
        PieceError: a step or a value is missing.
    """
    logged = {
        record.step: record.values
        for record in read_metrics(run / METRICS_FILE)
        if record.kind == "train"
    }
    try:
        return {
            step: {name: logged[step][name] for name in (*LOSSES, "grad_norm")} for step in steps
        }
    except KeyError as error:
        raise PieceError(f"{run / METRICS_FILE} has no {error}") from None


def _train(place: Workplace, name: str, *overrides: str, ranks: int = 1) -> Path:
    """Train the small model, or resume it; return its folder."""
    run = place.work / name
    if name != "resumed":
        _remove(run)
    place.mellum2(
        f"train_{name}",
        *("train", _recipe(place), "--device", _device(place)),
        *("--nproc", str(ranks), "--output", str(run), *_settings(place, ranks), *overrides),
    )
    return run


def _recipe(place: Workplace) -> str:
    return "mellum2_tiny_pretrain" if place.rehearsal else "mellum2_4layer_pretrain_1gpu_h200_fp8"


def _device(place: Workplace) -> str:
    return "cpu" if place.rehearsal else "cuda"


def _settings(place: Workplace, ranks: int = 1) -> list[str]:
    """Return the overrides that make the small model and its short runs."""
    data, samples = place.work / "data", _SAMPLES * ranks
    size = ["architecture.vocab_size=1024", "architecture.hidden_size=64", DETERMINISTIC]
    if not place.rehearsal:
        size = [
            "architecture.vocab_size=8192",
            "architecture.eos_token_id=1",  # of a tokenizer that `data prepare` trains
            "architecture.num_experts=16",
            "data.sequence_length=2048",
            "data.phase=null",
            "precision.compute=bf16",
            "backend=te",
        ]
    return [
        *size,
        *(f"layout.ep={ranks}", f"layout.dp={ranks}", "seed_weights=by_name"),
        *(f"data.path={data}", "data.workers=0"),
        *(f"schedule.batch_schedule=[[0,{samples}]]", "schedule.micro_batch_size=2"),
        *(f"schedule.train_samples={STEPS * samples}", f"schedule.warmup_samples={samples}"),
        *(f"schedule.decay_samples={samples}", f"checkpoint.save_interval={SAVED}"),
        *("logging.log_interval=1", "logging.eval_iterations=0", "logging.tensorboard=false"),
    ]


def _score(place: Workplace, run: Path, tokens: Path, backend: str, dtype: str) -> Path:
    """Write the logits of a checkpoint; return their file."""
    out = place.work / f"{backend}_{dtype}.npz"
    place.mellum2(
        f"score_{backend}_{dtype}",
        *("score", "--megatron-path", str(run), "--tokens", str(tokens), "--out", str(out)),
        *("--backend", backend, "--torch-dtype", dtype, "--device", _device(place)),
    )
    return out


def _remove(folder: Path) -> None:
    """Remove what an earlier, unfinished attempt has left."""
    if folder.exists():
        remove_directory(folder)


def _size(run: Path) -> dict[str, int]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {"bytes on disk": sum(path.stat().st_size for path in files)}
