"""The last step of a plan: results of stage ``packs`` become the folders that training reads.

Files are linked, not copied, where the disk allows it. All phases are made before the first takes
its name, so that a failure leaves the former ones. A run that reads an older phase keeps the files
that it has open.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import atomic_directory, write_json
from mellum2_megatron.common.staging import remove_leftovers
from mellum2_megatron.data.phase_record import PHASE_FILE, PhaseRecord, phase_folder
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.plan import LARGEST_MARGIN
from mellum2_megatron.data.pipeline.tasks import Task
from mellum2_megatron.data.tokens.pack_writer import ShardFacts, write_record
from mellum2_megatron.data.tokens.tokenizer import copy_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)


def assemble(graph: Graph) -> list[PhaseRecord]:
    """Make the folder of every phase.

    Raises:
        InputError: a result is missing.
        WorkError: a source has fewer packs than a phase needs; the disk is full.
    """
    tasks = graph.packs()
    for task in tasks:
        if not task.done(graph.results):
            raise InputError(
                f"task {task.name}", rule="its result is not there", fix="run stage packs first"
            )
    remove_leftovers(graph.results)
    try:
        kept = graph.results / "tokenizer"
        there = (kept / "tokenizer.json").is_file()
        if not there or tokenizer_hash(kept) != graph.tokenizer["sha256"]:
            # At once: half a file would count as the tokenizer ever after.
            with atomic_directory(kept, overwrite=True) as folder:
                copy_tokenizer(Path(graph.plan.tokenizer), folder)
        content = hashlib.sha256("\n".join(task.name for task in tasks).encode()).hexdigest()
        with ExitStack() as stack:
            records = [
                _phase(
                    graph,
                    number,
                    [task for task in tasks if task.settings["phase"] == number],
                    content,
                    stack.enter_context(
                        atomic_directory(phase_folder(graph.results, number), overwrite=True)
                    ),
                )
                for number in range(1, len(graph.plan.phases) + 1)
            ]
        _remove_phases_after(graph.results, len(graph.plan.phases))
    except OSError as error:
        raise WorkError(
            f"the folders of the phases: {error}", fix="free space, and run the plan again"
        ) from error
    return records


def _remove_phases_after(results: Path, last: int) -> None:
    """Remove phases that an earlier version of the plan had: a training would take them."""
    for folder in sorted(results.glob("phase-*")):
        number = folder.name.removeprefix("phase-")
        if number.isdigit() and int(number) > last:
            logger.info("removed %s: the plan has %d phases now", folder, last)
            shutil.rmtree(folder)


def _larger_margin(margin: float, needed: int, packs: int) -> str:
    """Return the advice for too few packs: a margin that suffices at the same share of drops."""
    # Rounded up to hundredths, and one more for drops that are unequal.
    wanted = math.ceil(100 * ((1 + margin) * needed / packs - 1)) / 100 + 0.01 if packs else 1.0
    if wanted > LARGEST_MARGIN:
        return "most of the source is repetition: filter it, or lower `unique_tokens` of the phase"
    return f"set `margin: {wanted:g}` in the plan, above {margin:g}, and run it again"


def _phase(graph: Graph, number: int, tasks: list[Task], content: str, folder: Path) -> PhaseRecord:
    """Fill the folder of a phase."""
    phase = graph.plan.phases[number - 1]
    counts: dict[str, int] = {}
    for source in phase.mixture:
        mine = [task for task in tasks if task.source == source]
        splits = {
            split: link_shards(mine, graph.results, folder / source, split)
            for split in ("train", "valid")
        }
        copy_tokenizer(Path(graph.plan.tokenizer), folder / source / "tokenizer")
        write_record(
            folder / source,
            splits=splits,
            sequence_length=phase.sequence_length,
            sources=list(graph.plan.sources),
            tokenizer_sha256=graph.tokenizer["sha256"],
            vocab_size=graph.tokenizer["vocab_size"],
            eod=graph.tokenizer["eod"],
            more={"results": [task.name for task in mine]},
        )
        counts[source] = sum(shard.packs for shard in splits["train"])
        needed = -(-phase.tokens_of(source) // phase.sequence_length)
        if counts[source] < needed:
            dropped = sum(task.manifest(graph.results)["packs_few_unique"] for task in mine)
            raise WorkError(
                f"phase {number} needs {needed:,} sequences of {source}, and there are "
                f"{counts[source]:,}: {dropped:,} packs were dropped for too few unique tokens",
                fix=_larger_margin(graph.plan.margin, needed, counts[source]),
            )
    total = sum(phase.mixture.values())
    record = PhaseRecord(
        plan=graph.plan.name,
        phase=number,
        sequence_length=phase.sequence_length,
        samples=phase.samples(),
        shares={source: 100 * share / total for source, share in phase.mixture.items()},
        packs=counts,
        content=content,
    )
    write_json(folder / PHASE_FILE, asdict(record))
    return record


def link_shards(tasks: list[Task], results: Path, folder: Path, split: str) -> list[ShardFacts]:
    """Link the shards of one split as ``SPLIT-00000``, ``SPLIT-00001`` ...; return their facts."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[ShardFacts] = []
    for task in tasks:
        if task.settings["split"] != split:
            continue
        for facts in task.manifest(results)["shards"]:
            name = f"{split}-{len(shards):05}"
            for suffix in facts["files"]:
                _link(task.folder(results) / f"{facts['name']}{suffix}", folder / f"{name}{suffix}")
            shards.append(ShardFacts(**{**facts, "name": name}))
    return shards


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)
