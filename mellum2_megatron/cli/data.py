"""`mellum2 data prepare`: text to training-ready tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mellum2_megatron.cli.options import Overwrite
from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.corpus.sources import TEXT_KEYS

data_app = typer.Typer(help="Make training data.", no_args_is_help=True)


OutputOption = Annotated[Path, typer.Option("--output", help="folder to write")]
InputFilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        help="text file, .jsonl (also .gz, .zst), .json.gz or .parquet file, or folder "
        "(repeatable); default: the Python sources installed on this machine",
    ),
]
TextKeyOption = Annotated[
    str | None,
    typer.Option(
        "--text-key",
        "--key",
        help="key or column of the text in rows; default: the first of "
        f"{', '.join(TEXT_KEYS)} that a file has",
    ),
]
SkipBadRowsOption = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows", help="count rows without a readable text instead of refusing them"
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer", help="Hugging Face tokenizer folder; default: train a new tokenizer"
    ),
]
EodOption = Annotated[
    str | None,
    typer.Option(
        "--eod",
        help="token that ends every document, or its id; "
        "default: <|endoftext|> where the tokenizer has it, else its eos",
    ),
]
VocabSizeOption = Annotated[
    int, typer.Option("--vocab-size", help="entries of a newly trained tokenizer")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="processes; default: one per core")
]
MaxMegabytesOption = Annotated[
    float | None,
    typer.Option(
        "--max-megabytes",
        min=0,
        help="size of an even sample of the text; 0: all of it; "
        "default: 32 MiB of the installed sources, all of --input",
    ),
]
MaxDocumentMegabytesOption = Annotated[
    float | None,
    typer.Option(
        "--max-document-megabytes",
        min=0,
        help="leave out longer documents; 0: none; "
        "default: 0.26 (256 KiB) for the installed sources, no limit for --input",
    ),
]
ValidFractionOption = Annotated[
    float,
    typer.Option("--valid-fraction", help="share of the documents held out for validation"),
]
SeedOption = Annotated[int, typer.Option("--seed", help="seed of the sample and the split")]
FormOption = Annotated[
    Literal["packs", "megatron"],
    typer.Option(
        "--format",
        help="packs: filters, duplicates, FIM and best-fit packing, as in a corpus plan; "
        "megatron: all texts as Megatron's indexed dataset, which training cuts anywhere",
    ),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option("--sequence-length", help="tokens of a pack; default: 256, as the tiny recipes"),
]
AlignOption = Annotated[
    int | None,
    typer.Option(
        "--align", help="pieces begin at multiples of it; default: 1; 2 x layout.cp for CP"
    ),
]
KindOption = Annotated[
    Literal["code", "text"] | None,
    typer.Option("--kind", help="filters to use; default: by the languages of a sample"),
]
FiltersOption = Annotated[
    bool | None,
    typer.Option(
        "--filters/--no-filters",
        help="drop documents of low quality and near-duplicates; default: yes",
    ),
]
FimRateOption = Annotated[
    float | None,
    typer.Option(
        "--fim-rate",
        help="share of the documents in fill-in-the-middle form; default: 0.5, or 0 for a "
        "tokenizer without FIM tokens",
    ),
]


@data_app.command("prepare")
def prepare(
    output: OutputOption,
    inputs: InputFilesOption = None,
    text_key: TextKeyOption = None,
    skip_bad_rows: SkipBadRowsOption = False,
    tokenizer: TokenizerOption = None,
    eod: EodOption = None,
    vocab_size: VocabSizeOption = 4096,
    workers: WorkersOption = None,
    max_megabytes: MaxMegabytesOption = None,
    max_document_megabytes: MaxDocumentMegabytesOption = None,
    valid_fraction: ValidFractionOption = 0.02,
    seed: SeedOption = 1234,
    form: FormOption = "packs",
    sequence_length: SequenceLengthOption = None,
    align: AlignOption = None,
    kind: KindOption = None,
    filters: FiltersOption = None,
    fim_rate: FimRateOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into training-ready tokens.

    Writes packs or Megatron's indexed datasets, their tokenizer, and corpus.json.
    """
    from mellum2_megatron.data.corpus.discovery import INSTALLED_FILE_LIMIT
    from mellum2_megatron.data.corpus.sources import ReadOptions
    from mellum2_megatron.data.prepare import prepare as prepare_documents
    from mellum2_megatron.data.prepare_packs import Packing, prepare_packs
    from mellum2_megatron.upstream import quiet_upstream

    quiet_upstream()
    wishes = {
        "sequence_length": sequence_length,
        "align": align,
        "kind": kind,
        "filters": filters,
        "fim_rate": fim_rate,
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    if form == "megatron" and given:
        raise InputError(
            f"--format megatron with --{next(iter(given)).replace('_', '-')}",
            rule="it takes all texts as they are; filters, FIM and packing belong to packs",
            fix="use --format packs, or drop the option",
        )
    max_document_bytes = _bytes("--max-document-megabytes", max_document_megabytes)
    if max_document_bytes is None and not inputs:
        max_document_bytes = INSTALLED_FILE_LIMIT
    options = {
        "inputs": inputs or (),
        "tokenizer": tokenizer,
        "eod": eod,
        "vocab_size": vocab_size,
        "workers": workers,
        "max_bytes": _bytes("--max-megabytes", max_megabytes),
        "options": ReadOptions(
            text_key=text_key,
            skip_bad_rows=skip_bad_rows,
            max_document_bytes=max_document_bytes or None,
        ),
        "seed": seed,
        "valid_fraction": valid_fraction,
        "overwrite": overwrite,
    }
    if form == "megatron":
        facts = prepare_documents(output, **options).corpus  # type: ignore[arg-type]
    else:
        facts = prepare_packs(output, packing=Packing(**given), **options)  # type: ignore[arg-type]
    _print_prepared(output, facts, asks_fim=fim_rate != 0)


def _print_prepared(output: Path, facts: Mapping[str, Any], *, asks_fim: bool) -> None:
    """Print what became of the documents, from the facts of corpus.json."""
    from mellum2_megatron.data.corpus.left_out import LeftOut, printable
    from mellum2_megatron.data.prepare_packs import dropped_lines
    from mellum2_megatron.data.tokens.document_tokenizer import Fidelity

    left_out = LeftOut(facts["documents_left_out"], facts["documents_left_out_first"])
    for line in (*left_out.lines(), *dropped_lines(facts.get("documents_dropped", ()))):
        print_line(line)
    for warning in Fidelity(**facts["tokenizer"]["fidelity"]).warnings():
        print_line(f"warning: {warning}")
    encoder = facts["encoder"]
    print_line(f"encoded with {encoder['engine']}: {encoder['reason']}")
    train = facts["splits"]["train"]
    wrote = f"wrote {printable(output)}: {train['tokens']:,} training tokens"
    if "plan" in facts:
        phase, source = facts["plan"]["phases"][0], facts["plan"]["sources"]["corpus"]
        rate = phase["fim"]["rate"]
        print_line(
            f"packed as {source['kind']}, FIM in {rate:.0%} of the documents"
            + ("" if rate or not asks_fim else ": the tokenizer has no FIM tokens")
        )
        print_line(f"corpus report: {printable(output)}/report/report.md")
        wrote += f" in {train['packs']:,} packs of {phase['sequence_length']:,}"
    print_line(wrote)


@data_app.command("stream")
def stream(
    run: Annotated[Path, typer.Argument(help="run file (run.yaml) with data.feed=redis")],
) -> None:
    """Stream a run's training samples through Redis until interrupted.

    The launchers start it with the run; by hand it is for data.stream.url and a machine of its own.
    """
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.training.streamer import stream as stream_samples

    stream_samples(read_run(run))


def _bytes(option: str, megabytes: float | None) -> int | None:
    """Return an option's megabytes in bytes, None if it was not given."""
    if megabytes is None:
        return None
    if not math.isfinite(megabytes):  # min=0 lets NaN and infinity through
        raise InputError(
            f"{option} {megabytes}", rule="must be finite", fix="use 0 to take everything"
        )
    size = int(megabytes * 1e6)
    if megabytes and not size:  # 0 bytes would take everything
        raise InputError(
            f"{option} {megabytes}", rule="is less than a byte", fix="use 0 to take everything"
        )
    return size
