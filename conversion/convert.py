"""Import, export, round trip and stitching between Hugging Face folders and Megatron checkpoints.

Each function opens its sources, makes a job and runs or plans it. The engine is
`conversion.jobs.job`. The ``convert`` methods of `ImportJob`, `ExportJob` and `StitchJob` move a
tensor from file to file, one at a time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion.exportable import ROUTER_BIAS, require_exportable
from conversion.huggingface.folder import HfFolder
from conversion.huggingface.format import listed, tensor_bytes
from conversion.jobs.exporting import ExportJob
from conversion.jobs.importing import ImportJob
from conversion.jobs.job import ConversionRequest
from conversion.jobs.mtp_stitching import StitchJob
from conversion.jobs.reports import ConversionPlan, ConversionReport, RoundTripReport
from conversion.jobs.tensor_checks import TensorChecks
from conversion.mapping import derive, megatron_shapes
from conversion.torch_dist.reader import TorchDistReader
from mellum2_megatron.checkpoint import CheckpointFolder, find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.staging import staging
from mellum2_megatron.config import Layout

PathLike = str | os.PathLike[str]


def import_hf(
    hf_path: PathLike,
    megatron_path: PathLike,
    *,
    dtype: str | None = None,
    keep_dtypes: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    layout: Layout | None = None,
    checks: TensorChecks | None = None,
) -> ConversionReport:
    """Convert a Hugging Face folder into a Megatron checkpoint.

    The weights are written to ``megatron_path/release``, tokenizer and architecture beside it.

    Args:
        hf_path: folder with config.json and safetensors, experts unfused or fused.
        megatron_path: folder to write; Megatron's ``--load`` takes it.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; default: the weights' own,
            bit for bit.
        keep_dtypes: take a source of several dtypes and keep each tensor's, default False: it is
            refused.
        overwrite: replace an earlier import, default False.
        workers: files written at a time, default one per core, at most 8.
        layout: layout that the model must fit, default none. The result serves every layout.
        checks: checks of each tensor; default: its hash, if there is a manifest, and finite
            values.

    Raises:
        InputError: the folder, the dtype, the layout or the target cannot be used; nothing was
            written.
        WorkError: writing failed; the same call continues from the finished units.
    """
    request = ConversionRequest.of(
        megatron_path,
        dtype=dtype,
        keep_dtypes=keep_dtypes,
        overwrite=overwrite,
        workers=workers,
        checks=checks,
    )
    with _import_job(hf_path, request, layout) as job:
        return job.run()


def plan_import(
    hf_path: PathLike,
    megatron_path: PathLike,
    *,
    dtype: str | None = None,
    keep_dtypes: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    layout: Layout | None = None,
    checks: TensorChecks | None = None,
) -> ConversionPlan:
    """Return the plan of `import_hf` with the same arguments; read no weight, write nothing.

    Raises:
        InputError: as for `import_hf`, except for errors that only the weights show.
        WorkError: the disk is too full.
    """
    request = ConversionRequest.of(
        megatron_path,
        dtype=dtype,
        keep_dtypes=keep_dtypes,
        overwrite=overwrite,
        workers=workers,
        checks=checks,
    )
    with _import_job(hf_path, request, layout) as job:
        return job.plan()


@contextmanager
def _import_job(
    hf_path: PathLike, request: ConversionRequest, layout: Layout | None
) -> Iterator[ImportJob]:
    with HfFolder.open(hf_path) as hf:
        # Only to refuse a bad layout early: a torch_dist checkpoint itself has none.
        if layout is not None:
            layout.validate(
                hf.architecture,
                world_size=layout.smallest_world_size,
                sequence_length=hf.architecture.max_position_embeddings,
            )
        yield ImportJob(hf, request)


def export_hf(
    megatron_path: PathLike,
    hf_path: PathLike,
    *,
    dtype: str | None = None,
    keep_dtypes: bool = False,
    tokenizer: PathLike | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    checks: TensorChecks | None = None,
) -> ConversionReport:
    """Convert a Megatron checkpoint into a Hugging Face folder.

    The folder has the released layout, ``mtp.*`` included.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it. Its optimizer state is left
            out.
        hf_path: folder to write.
        dtype: ``bfloat16``, ``float16`` or ``float32`` to convert to; default: the weights' own,
            bit for bit.
        keep_dtypes: take a source of several dtypes and keep each tensor's, default False: it is
            refused.
        tokenizer: folder of tokenizer files, default the checkpoint's own.
        overwrite: replace an earlier export, default False.
        workers: layers converted at a time, default one per core, at most 8.
        checks: checks of each tensor; default: its hash, if there is a manifest, and finite
            values.

    Raises:
        InputError: the checkpoint, the dtype, the tokenizer or the target cannot be used; nothing
            was written.
        WorkError: writing failed; the same call continues from the finished units.
    """
    request = ConversionRequest.of(
        hf_path,
        dtype=dtype,
        keep_dtypes=keep_dtypes,
        overwrite=overwrite,
        workers=workers,
        checks=checks,
    )
    return _export_job(megatron_path, request, tokenizer).run()


def plan_export(
    megatron_path: PathLike,
    hf_path: PathLike,
    *,
    dtype: str | None = None,
    keep_dtypes: bool = False,
    tokenizer: PathLike | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    checks: TensorChecks | None = None,
) -> ConversionPlan:
    """Return the plan of `export_hf` with the same arguments; read no weight, write nothing.

    Raises:
        InputError: as for `export_hf`, except for errors that only the weights show.
        WorkError: the disk is too full.
    """
    request = ConversionRequest.of(
        hf_path,
        dtype=dtype,
        keep_dtypes=keep_dtypes,
        overwrite=overwrite,
        workers=workers,
        checks=checks,
    )
    return _export_job(megatron_path, request, tokenizer).plan()


def _export_job(
    megatron_path: PathLike, request: ConversionRequest, tokenizer: PathLike | None
) -> ExportJob:
    checkpoint = find_checkpoint(megatron_path)
    reader = open_checkpoint(checkpoint)
    require_exportable(checkpoint, reader)
    folder = Path(tokenizer) if tokenizer is not None else None
    return ExportJob(checkpoint, reader, request, folder)


def stitch_mtp(
    source: PathLike,
    target: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    checks: TensorChecks | None = None,
) -> ConversionReport:
    """Write the model of ``target`` with the MTP head of ``source`` to ``output``.

    Neither ``target`` nor ``source`` is changed.

    Args:
        source: Hugging Face folder that has the MTP head.
        target: Hugging Face folder that lost its head; its config.json may still announce one.
        output: folder to write.
        overwrite: replace an earlier result, default False.
        workers: layers copied at a time, default one per core, at most 8.
        checks: checks of each tensor; default: its hash, if there is a manifest, and finite
            values.

    Raises:
        InputError: ``source`` has no head, ``target`` has one, or they differ otherwise.
        WorkError: writing failed; the same call continues from the finished units.
    """
    request = ConversionRequest.of(output, overwrite=overwrite, workers=workers, checks=checks)
    with HfFolder.open(source) as head, HfFolder.open(target, lost_mtp=True) as trunk:
        return StitchJob(head, trunk, request).run()


def roundtrip(
    hf_path: PathLike, *, work_dir: PathLike | None = None, workers: int | None = None
) -> RoundTripReport:
    """Import and export ``hf_path`` and compare every tensor's bytes; nothing is kept.

    Args:
        hf_path: Hugging Face folder.
        work_dir: folder for the two temporary copies, default the system's temporary folder.
        workers: as in `import_hf`.

    Raises:
        InputError: the folder cannot be converted.
        WorkError: writing failed.
    """
    start = time.monotonic()
    # Bytes are compared, and NaN has bytes too.
    any_value = TensorChecks(allow_nonfinite=True)
    with staging(Path(work_dir or tempfile.gettempdir()) / "mellum2-roundtrip") as folder:
        megatron, exported = folder / "megatron", folder / "hf"
        import_hf(hf_path, megatron, keep_dtypes=True, workers=workers, checks=any_value)
        export_hf(megatron, exported, keep_dtypes=True, workers=workers, checks=any_value)
        # Frees the disk: the comparison needs the exported copy only.
        shutil.rmtree(megatron)
        with HfFolder.open(hf_path) as before, HfFolder.open(exported) as after:
            names = [source.name for entry in before.entries for source in entry.sources]
            differing = [
                name
                for name in names
                # Equal bytes of another dtype are other values.
                if before.dtypes.by_name[name] != after.dtypes.by_name[name]
                or tensor_bytes(before.tensor(name)) != tensor_bytes(after.tensor(name))
            ]
            return RoundTripReport(
                path=before.path,
                dtype=str(before.dtypes),
                tensors=len(names),
                nbytes=before.nbytes,
                seconds=time.monotonic() - start,
                differing=tuple(differing),
                same_architecture=before.architecture == after.architecture,
            )


def open_checkpoint(checkpoint: CheckpointFolder) -> TorchDistReader:
    """Open a checkpoint's weights and compare names and shapes with its architecture.

    Raises:
        InputError: weights missing, extra or misshapen for the architecture beside the checkpoint.
    """
    reader = TorchDistReader(checkpoint.iteration_dir)
    entries = derive(checkpoint.architecture)
    expected = megatron_shapes(entries)
    # Names before shapes: missing and extra weights show best that it is another model.
    fix = "give a checkpoint whose architecture.json is its own"
    if missing := sorted(set(expected) - set(reader.tensors)):
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(missing)} missing",
            rule="architecture.json describes a model that has them",
            fix=fix,
        )
    # The bias of an ablation's router is neither extra nor part of the released layout: scoring
    # loads it, and an export refuses it (`conversion.exportable`).
    given = {key for key in reader.tensors if not key.endswith(ROUTER_BIAS)}
    if extra := sorted(given - set(expected)):
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(extra)} not part of the model",
            rule="architecture.json describes a model without them",
            fix=fix,
        )
    padded = {entry.key for entry in entries if entry.padded_vocabulary}
    wrong = []
    for key, shape in expected.items():
        stored = reader.tensors[key].shape
        # A run with tensor parallelism pads the vocabulary's rows at the end; an export leaves the
        # padding out.
        padding = key in padded and stored[1:] == shape[1:] and stored[0] >= shape[0]
        if stored != shape and not padding:
            wrong.append(f"{key} {list(stored)} (expected {list(shape)})")
    if wrong:
        raise InputError(
            f"{checkpoint.iteration_dir}: {listed(wrong)}",
            rule="shapes follow from architecture.json",
            fix=fix,
        )
    return reader
