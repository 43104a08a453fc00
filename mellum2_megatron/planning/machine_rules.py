"""Rules about what a run needs on its machine: packages, servers, folders and data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

import psutil

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, size_text
from mellum2_megatron.config import Device, Run
from mellum2_megatron.data.feed.entries import tokenizer_folder
from mellum2_megatron.data.feed.redis_run import (
    URL_VARIABLE,
    memory_limit,
    two_batches,
    window_of,
)
from mellum2_megatron.data.tokens.prompts import encode_prompts
from mellum2_megatron.data.tokens.tokenizer import special_ids
from mellum2_megatron.planning.gpus import BEFORE_HOPPER, BLACKWELL
from mellum2_megatron.planning.optional_packages import missing_dispatcher
from mellum2_megatron.planning.rule import PlannedRun, Problems, rule

DETERMINISTIC_SCORES = 2**30
"""Scores of a micro-batch (heads x queries x keys, summed over documents) from which on Transformer
Engine has no deterministic fused attention within documents on Hopper."""

DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
"""Folder in which NVIDIA's driver describes each card of this machine, if there is one."""


@rule(evidence="this machine", machine=True)
def packages_present(planned: PlannedRun) -> Problems:
    """The packages that the run needs are installed."""
    if (
        planned.backend == "te"
        and planned.device == "cuda"
        and importlib.util.find_spec("transformer_engine") is None
    ):
        yield InputError(
            f"backend={planned.run.backend}, te on a GPU",
            rule="Transformer Engine is not installed here",
            fix="install the extra `te`, or set backend=torch (much slower, for checks)",
        )
    layout = planned.run.layout
    if layout.dispatcher == "flex" and planned.device == "cuda":
        missing = missing_dispatcher(layout.dispatcher_backend)
        if missing is not None:
            yield InputError(
                f"layout.dispatcher=flex, layout.dispatcher_backend={layout.dispatcher_backend}",
                rule=missing,
                fix="install it (docs/install.md), or set layout.dispatcher=alltoall",
            )
    project = planned.run.logging.wandb_project
    if project is not None and importlib.util.find_spec("wandb") is None:
        yield InputError(
            f"logging.wandb_project={project}",
            rule="the package wandb is not installed here",
            fix="install the extra `wandb`, or set logging.wandb_project=null",
        )


@rule(evidence="data/feed/redis_streamer.py: the window moves with the slowest reader")
def stream_window_holds_batches(planned: PlannedRun) -> Problems:
    """The window of a stream holds two of the run's largest batches."""
    run, least = planned.run, two_batches(planned.run)
    if run.data.feed == "redis" and window_of(run) < least:
        yield InputError(
            f"data.stream.window={run.data.stream.window}",
            rule="it must hold two of the run's largest batches, one to train on and one ahead",
            fix=f"use {least} or more, or null",
        )


@rule(evidence="this machine", machine=True)
def stream_can_be_served(planned: PlannedRun) -> Problems:
    """Redis is installed, and this machine's memory holds the window of the stream."""
    run = planned.run
    if run.data.feed != "redis":
        return
    if importlib.util.find_spec("redis") is None:
        yield InputError(
            "data.feed=redis",
            rule="the package redis is not installed here",
            fix="install the extra `stream`, or set data.feed=files",
        )
    # A launcher that has named its server has found the program, maybe on another node.
    if run.data.stream.url is not None or URL_VARIABLE in os.environ:
        return
    if shutil.which("redis-server") is None:
        yield InputError(
            "data.feed=redis without data.stream.url",
            rule="the program redis-server is not installed here",
            fix="install it (Debian, Ubuntu: apt-get install redis-server), or name a server in "
            "data.stream.url",
        )
    limit, total = memory_limit(run), psutil.virtual_memory().total
    if limit > total // 2:
        yield InputError(
            f"data.stream.window={run.data.stream.window}",
            rule=f"{window_of(run):,} samples ahead may take {size_text(limit)}, this machine has "
            f"{size_text(total)} of memory for all",
            fix="lower data.stream.window, name a server in data.stream.url, or set "
            "data.feed=files",
        )


@rule(
    evidence="a file here is one everywhere; a folder that is only on another machine is not "
    "looked for"
)
def paths_are_folders(planned: PlannedRun) -> Problems:
    """Where a folder is meant there is no file."""
    data, checkpoint = planned.run.data, planned.run.checkpoint
    for key, path in (
        ("data.path", data.path),
        ("data.tokenizer", data.tokenizer),
        ("data.cache", data.cache),
        ("checkpoint.output", checkpoint.output),
        ("checkpoint.load", checkpoint.load),
        ("checkpoint.continue_from", checkpoint.continue_from),
    ):
        if path is None:
            continue
        for place in (Path(path), *Path(path).parents):
            # os.path, because pathlib raises where a folder may not be entered.
            if os.path.exists(place) and not os.path.isdir(place):
                yield InputError(
                    f"{key}={path}",
                    rule=f"{place} is a file, not a folder",
                    fix=_folder_of_plan(place) if key == "data.path" else "name a folder",
                )


def _folder_of_plan(file: Path) -> str:
    """Return the fix for a file given as ``data.path``: of a corpus plan, the folder it makes."""
    if file.suffix in (".yaml", ".yml"):
        # Imports numpy, which planning for another machine does not need.
        from mellum2_megatron.data.pipeline.plan_file import results_folder

        try:
            return (
                f"name the folder that this plan makes, and a phase: "
                f"data.path={results_folder(file)} data.phase=1"
            )
        except InputError:
            pass  # another file, or a plan with a fault
    return "name a folder"


@rule(evidence="this machine", machine=True, after=paths_are_folders)
def data_present(planned: PlannedRun) -> Problems:
    """The data, their tokenizer and a place for their index exist; the tokens are the model's."""
    # Imports numpy, which planning for another machine does not need.
    from mellum2_megatron.data.feed.sources import check_amounts, check_data

    run = planned.run
    try:
        data = check_data(run)
        check_amounts(run, data)
        if run.data.feed == "rollouts":
            return
        caches = {source.cache for source in (*data.train, *data.valid) if not source.shards}
        if run.data.cache is not None:
            caches = {Path(run.data.cache)}
        for cache in sorted(caches):
            # An existing cache may be read-only, since a complete one is only read.
            if not cache.is_dir():
                check_writable("data.cache", cache, folder=True)
    except InputError as error:
        yield error


@rule(
    evidence="transformer_engine/pytorch/attention/dot_product_attention/utils.py:1173, 1789 "
    "(2.20.2); tests/te/test_te_backend.py",
    machine=True,
    after=data_present,
)
def deterministic_documents_have_a_kernel(planned: PlannedRun) -> Problems:
    """Deterministic attention within long documents has FlashAttention on Hopper."""
    from mellum2_megatron.data.feed.sources import check_data

    run, layout = planned.run, planned.run.layout
    if not _chooses_deterministic_kernels(planned):
        return
    sequences, length = run.schedule.micro_batch_size, run.data.sequence_length
    scores = sequences * run.architecture.num_attention_heads * length**2
    if scores < DETERMINISTIC_SCORES or _are_cards(planned, BLACKWELL):
        return
    if _are_cards(planned, BEFORE_HOPPER):
        return  # `deterministic_attention_before_hopper` has its say
    # Context parallelism pads each document, which version 2 does not know.
    needed = ("flash-attn-3",) if layout.cp > 1 else ("flash-attn", "flash-attn-3")
    if any(map(_is_installed, needed)) or not check_data(run).document_attention:
        return
    yield InputError(
        f"execution.deterministic=true with documents in sequences of {length:,} tokens",
        rule=f"on Hopper cuDNN's deterministic attention needs 128 bytes of workspace for each of "
        f"{scores:,} scores, so Transformer Engine takes it below {DETERMINISTIC_SCORES:,} only, "
        f"and {' or '.join(needed)} is not installed here",
        fix=f"install {needed[-1]}, or set execution.deterministic=false",
    )


@rule(
    evidence="transformer_engine/pytorch/attention/dot_product_attention/utils.py:1741, 1780 "
    "(2.20.2)",
    machine=True,
    after=data_present,
)
def deterministic_attention_before_hopper(planned: PlannedRun) -> Problems:
    """Deterministic attention has FlashAttention 2 on cards before Hopper."""
    from mellum2_megatron.data.feed.sources import check_data

    run = planned.run
    if not _chooses_deterministic_kernels(planned):
        return
    if not _are_cards(planned, BEFORE_HOPPER):
        return
    value, lacks = "execution.deterministic=true on a card before Hopper", ""
    fix = "set execution.deterministic=false"
    if not _is_installed("flash-attn"):
        lacks, fix = "and flash-attn is not installed here", f"install flash-attn, or {fix}"
    elif run.layout.cp > 1 and check_data(run).document_attention:
        # Context parallelism pads each document, which version 2 does not know.
        value += f" with documents and layout.cp={run.layout.cp}"
        lacks, fix = "and flash-attn takes no documents there", f"set layout.cp=1, or {fix}"
    if lacks:
        yield InputError(
            value,
            rule="Transformer Engine takes cuDNN's deterministic attention from Hopper on, "
            f"{lacks}; it would keep all scores of each layer",
            fix=fix,
        )


NODE_RULES = (
    packages_present,
    deterministic_documents_have_a_kernel,
    deterministic_attention_before_hopper,
)
"""Rules about the packages of the machine that trains. A login node need not have them."""


def check_node(run: Run, *, world_size: int, device: Device) -> None:
    """Refuse a run for which this machine lacks a package (`NODE_RULES`).

    Of a node's launcher, once, before it starts ranks.

    Raises:
        InputError: the first package that is missing; or the data are not readable.
    """
    new = StartingPoint(kind="new")
    planned = PlannedRun(run=run, world_size=world_size, device=device, start=new)
    for entry in NODE_RULES:
        for problem in entry.find(planned):
            raise problem


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _chooses_deterministic_kernels(planned: PlannedRun) -> bool:
    """Return true if Transformer Engine has to find a deterministic attention on GPUs."""
    te = planned.device == "cuda" and planned.backend == "te"
    return te and planned.run.execution.deterministic


def _are_cards(planned: PlannedRun, names: re.Pattern[str]) -> bool:
    """Return true if all cards are known to be of these, by name or by the driver here."""
    cards = [planned.gpu.label] if planned.gpu else []
    cards = cards or [file.read_text() for file in DRIVER_FOLDER.glob("*/information")]
    return bool(cards) and all(names.search(card) for card in cards)


@rule(evidence="training/tasks.py", machine=True)
def eval_tasks_fit(planned: PlannedRun) -> Problems:
    """The tokenizer has the tokens that the tasks need."""
    folder = tokenizer_folder(planned.run.data)
    tasks = planned.run.logging.eval_tasks
    if "fim" in tasks and (folder / "tokenizer.json").is_file():
        try:
            special = special_ids(folder, need_eos=False)
        except InputError as error:
            yield error
            return
        if not {"fim_prefix", "fim_middle", "fim_suffix"} <= special.keys():
            yield InputError(
                f"logging.eval_tasks: fim with the tokenizer {folder}",
                rule="it has no fill-in-the-middle tokens",
                fix="leave fim out",
            )


@rule(evidence="training/samples.py", machine=True)
def sample_prompts_fit(planned: PlannedRun) -> Problems:
    """Each prompt has tokens, and leaves room for a continuation, which can end (eos)."""
    run = planned.run
    room = run.data.sequence_length - run.logging.sample_tokens
    folder = tokenizer_folder(run.data)
    # Without a tokenizer `data_present` has its say.
    if run.logging.sample_prompts and (folder / "tokenizer.json").is_file():
        try:
            encode_prompts(folder, run.logging.sample_prompts, longest=room)
            special_ids(folder)
        except InputError as error:
            yield error
