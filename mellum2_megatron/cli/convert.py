"""`mellum2 convert`: import, export, roundtrip and stitch-mtp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mellum2_megatron.cli.options import MegatronPath, Overwrite, TokenizerPath, as_options
from mellum2_megatron.common.console import print_line

if TYPE_CHECKING:
    from conversion.jobs.tensor_checks import TensorChecks

convert_app = typer.Typer(
    help="Convert checkpoints between Megatron and Hugging Face.", no_args_is_help=True
)

# --hf-model is Megatron-Bridge's name of the option.
HfPath = Annotated[Path, typer.Option("--hf-path", "--hf-model", help="Hugging Face folder")]
TorchDtype = Annotated[
    str | None,
    typer.Option("--torch-dtype", help="bfloat16, float16 or float32; default: unchanged"),
]
KeepDtypes = Annotated[
    bool, typer.Option("--keep-dtypes", help="several dtypes: each tensor keeps its own")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="layers converted at once; default: one per core, at most 8"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and touch nothing")]
SkipHashes = Annotated[
    bool, typer.Option("--skip-hashes", help="do not check weights_manifest.json")
]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="convert NaN and infinite values as they are")
]
# Checks only: a torch_dist checkpoint is the same for every layout.
_Ways = Annotated[
    int,
    typer.Option(help="refuse a model that does not divide by this; the checkpoint is the same"),
]


@convert_app.command("import")
def convert_import(
    hf_path: HfPath,
    megatron_path: MegatronPath,
    torch_dtype: TorchDtype = None,
    keep_dtypes: KeepDtypes = False,
    tp: _Ways = 1,
    pp: _Ways = 1,
    ep: _Ways = 1,
    etp: _Ways = 1,
    workers: Workers = None,
    skip_hashes: SkipHashes = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint (torch_dist).

    The checkpoint serves every layout. After an interruption the same command resumes.
    """
    from conversion.convert import import_hf, plan_import
    from mellum2_megatron.config import Layout
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    with as_options():
        result = (plan_import if dry_run else import_hf)(
            hf_path,
            megatron_path,
            dtype=torch_dtype,
            keep_dtypes=keep_dtypes,
            overwrite=overwrite,
            workers=workers,
            # Sequence parallelism is no choice here: Layout requires it with tp > 1.
            layout=Layout(tp=tp, sp=tp > 1, pp=pp, ep=ep, etp=etp),
            checks=_checks(skip_hashes, allow_nonfinite),
        )
    print_line(str(result))


@convert_app.command("export")
def convert_export(
    megatron_path: MegatronPath,
    hf_path: HfPath,
    torch_dtype: TorchDtype = None,
    keep_dtypes: KeepDtypes = False,
    tokenizer: TokenizerPath = None,
    workers: Workers = None,
    skip_hashes: SkipHashes = False,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder.

    The folder has the released layout. After an interruption the same command resumes.
    """
    from conversion.convert import export_hf, plan_export
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    result = (plan_export if dry_run else export_hf)(
        megatron_path,
        hf_path,
        dtype=torch_dtype,
        keep_dtypes=keep_dtypes,
        tokenizer=tokenizer,
        overwrite=overwrite,
        workers=workers,
        checks=_checks(skip_hashes, allow_nonfinite),
    )
    print_line(str(result))


@convert_app.command("roundtrip")
def convert_roundtrip(hf_path: HfPath, workers: Workers = None) -> None:
    """Import a Hugging Face folder, export it again and compare every byte."""
    from conversion.convert import roundtrip
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    report = roundtrip(hf_path, workers=workers)
    print_line(str(report))
    raise typer.Exit(0 if report.ok else 1)


@convert_app.command("stitch-mtp")
def convert_stitch_mtp(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Hugging Face folder that has the MTP head")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Hugging Face folder that lost it")],
    output: Annotated[
        Path | None, typer.Option("--output", help="folder to write; default: DST-mtp")
    ] = None,
    workers: Workers = None,
    skip_hashes: SkipHashes = False,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
) -> None:
    """Give DST the MTP head of SRC, in a new folder.

    RL stacks and transformers' save_pretrained drop the head. SRC and DST stay unchanged.
    """
    from conversion.convert import stitch_mtp
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    report = stitch_mtp(
        source,
        target,
        output if output is not None else Path(f"{target}-mtp"),
        overwrite=overwrite,
        workers=workers,
        checks=_checks(skip_hashes, allow_nonfinite),
    )
    print_line(str(report))


def _checks(skip_hashes: bool, allow_nonfinite: bool) -> TensorChecks:
    from conversion.jobs.tensor_checks import TensorChecks

    return TensorChecks(hashes=not skip_hashes, allow_nonfinite=allow_nonfinite)
