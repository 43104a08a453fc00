"""`mellum2 data inspect | where | verify`: contents of packs, origin of samples, whole bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError

if TYPE_CHECKING:
    from mellum2_megatron.data.tokens.pack_files import PackFolder

_SHOWN_CHARACTERS = 48


def inspect(
    folder: Annotated[Path, typer.Argument(help="folder of packs")],
    pack: Annotated[
        int | None, typer.Option("--pack", help="show the pieces of this pack, from 0")
    ] = None,
    piece: Annotated[
        int | None,
        typer.Option(
            "--piece", help="with --pack: show the text of this piece, learnt tokens in green"
        ),
    ] = None,
    split: Annotated[Literal["train", "valid"], typer.Option("--split")] = "train",
) -> None:
    """Count the pieces of packs by source and kind, or show a pack or the text of a piece.

    Where there are no colours, ⟦ and ⟧ enclose what is learnt.
    """
    from mellum2_megatron.data.tokens.pack_files import read_pack_folder
    from mellum2_megatron.data.tokens.pack_report import report_packs

    if not (folder / "packs.json").is_file():
        raise InputError(
            str(folder),
            rule="it is no folder of packs (there is no packs.json)",
            fix="name one; a plan has PLAN/phase-1/SOURCE",
        )
    packs = read_pack_folder(folder, str(folder))
    count = packs.packs(split)
    if pack is not None:
        if not 0 <= pack < count:
            raise InputError(
                f"--pack {pack}",
                rule=f"the {split} split has packs 0 to {count - 1}" if count else "there are none",
                fix="name one of them",
            )
        if piece is None:
            _show_pack(packs, split, pack)
        else:
            _show_piece(packs, split, pack, piece)
        return
    if piece is not None:
        raise InputError(f"--piece {piece}", rule="a piece is one of a pack", fix="add --pack")
    report = report_packs(packs, split)
    print_line(
        f"{folder}, {split}: {report.packs:,} packs of {packs.sequence_length:,} tokens; "
        f"{report.padding:,} places padded, {report.labels:,} labels count"
    )
    table = plain_table("source", "pieces", "tokens")
    for name, pieces in report.pieces.items():
        table.add_row(name, f"{pieces:,}", f"{report.tokens[name]:,}")
    for words, number in report.kinds.items():
        table.add_row(words, f"{number:,}", "")
    console.print(table)


def _show_pack(packs: PackFolder, split: str, number: int) -> None:
    """Print the pieces of one pack, and the beginning of each text."""
    from mellum2_megatron.data.tokens.pack_report import KINDS, find_pack
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

    shard, pack = find_pack(packs, split, number)
    tokenizer = load_tokenizer(packs.path / "tokenizer")
    tokens, pieces, counted = shard.tokens(pack), shard.pieces(pack), shard.counted_labels(pack)
    padded = packs.sequence_length - int(pieces.lengths.sum())
    print_line(
        f"pack {number}: {shard.prefix.name} pack {pack}, {len(pieces.starts)} pieces, "
        f"{padded:,} places padded, {packs.sequence_length - int(counted.sum()):,} labels masked"
    )
    for start, length, flags, source, document in zip(
        pieces.starts.tolist(),
        pieces.lengths.tolist(),
        pieces.flags.tolist(),
        pieces.sources.tolist(),
        pieces.documents.tolist(),
        strict=True,
    ):
        kinds = [words for flag, words in KINDS.items() if flags & flag]
        masked = length - int(counted[start : start + length].sum())
        beginning = tokenizer.decode(
            tokens[start : start + min(length, _SHOWN_CHARACTERS)].tolist(),
            skip_special_tokens=False,
        )
        facts = [
            f"{start:>7} + {length:<7}",
            packs.sources[source],
            f"document {document:016x}",
            f"{masked} masked",
            *kinds,
        ]
        print_line(f"{'  '.join(facts)}  {beginning[:_SHOWN_CHARACTERS]!r}")


def _show_piece(packs: PackFolder, split: str, number: int, piece: int) -> None:
    """Print the text of one piece, with its learnt tokens in colour."""
    from rich.text import Text

    from mellum2_megatron.data.tokens.pack_report import find_pack
    from mellum2_megatron.data.tokens.tokenizer import load_tokenizer

    shard, pack = find_pack(packs, split, number)
    pieces = shard.pieces(pack)
    if not 0 <= piece < len(pieces.starts):
        raise InputError(
            f"--piece {piece}",
            rule=f"pack {number} has pieces 0 to {len(pieces.starts) - 1}",
            fix="name one of them",
        )
    start, length = int(pieces.starts[piece]), int(pieces.lengths[piece])
    tokens = shard.tokens(pack)[start : start + length].tolist()
    # The label at a place is the token after it.
    learnt = [False, *shard.counted_labels(pack)[start : start + length - 1].tolist()]
    tokenizer = load_tokenizer(packs.path / "tokenizer")
    shown = Text()
    for counts, group in itertools.groupby(range(length), key=learnt.__getitem__):
        part = tokenizer.decode([tokens[i] for i in group], skip_special_tokens=False)
        if console.color_system is None and counts:
            part = f"⟦{part}⟧"
        shown.append(part, style="bold green" if counts else "dim")
    print_line(
        f"pack {number}, piece {piece}: {packs.sources[int(pieces.sources[piece])]}, document "
        f"{int(pieces.documents[piece]):016x}, {length:,} tokens, {sum(learnt):,} learnt"
    )
    console.print(shown, soft_wrap=True)


def verify_command(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|PLAN.yaml",
            help="corpus plan, its folder, one phase of it, packs, or Megatron's format",
        ),
    ],
) -> None:
    """Hash all files of training data, and name each that is not as it was written.

    Training checks sizes only. Run it after data were copied.
    """
    from mellum2_megatron.common.files import size_text
    from mellum2_megatron.data.verify import verify_data

    folder, files, size = verify_data(data)
    print_line(f"{folder}: {files:,} files, {size_text(size)}, all as they were written")


def where(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run, or its run.yaml")],
    step: Annotated[int | None, typer.Argument(help="step of the run, from 1")] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", help="a sample of the training, from 0, not a step")
    ] = None,
) -> None:
    """Print the packs and documents that a step or a sample saw."""
    from mellum2_megatron.checkpoint import read_run
    from mellum2_megatron.upstream import quiet_upstream

    if (step is None) == (sample is None):
        raise InputError(
            "mellum2 data where",
            rule="it needs one step or one sample",
            fix="give STEP or --sample",
        )
    path = Path(run)
    resolved = read_run(path / "run.yaml" if path.is_dir() else path)
    quiet_upstream()
    from mellum2_megatron.data.feed.sample_places import places, samples_of_step

    samples = [sample] if sample is not None else samples_of_step(resolved, step or 0)
    for place in places(resolved, samples):
        name = (
            "documents"
            if place.pack is None
            else f"pack {place.pack}, epoch {place.epoch}, documents"
        )
        form = "d" if place.pack is None else "016x"
        listed = " ".join(format(document, form) for document in place.documents)
        print_line(f"sample {place.sample}  {place.source}  {place.files}  {name} {listed}")
