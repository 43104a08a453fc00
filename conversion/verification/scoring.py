"""Scores of one checkpoint: which process does what, and the file of the result.

There are three ways to run several ranks:

- this process starts them on its machine with the caller's starter (`RankStarter`);
- torchrun or srun has started this process as one of them (`environment_rank`): the first leads, it
  prepares and finishes, the others only assist;
- a layout of one rank runs in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from conversion.huggingface.folder import HfFolder
from conversion.huggingface.scoring import check_tokens, load_hf, score_sequences
from conversion.jobs.result_folder import check_space
from conversion.verification.megatron_scoring import score_rank
from conversion.verification.memory import require_huggingface_memory, require_rank_memory
from conversion.verification.ranks import Ranks
from conversion.verification.score_folder import (
    LOGITS,
    MTP_LOGITS,
    ScoreFolder,
    score_bytes,
    score_shapes,
)
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import check_writable, write_json
from mellum2_megatron.common.free_memory import free_memory
from mellum2_megatron.common.staging import staging
from mellum2_megatron.config import Device

_JOB_FILE, _TOKENS_FILE = "job.json", "tokens.npy"


class RankStarter(Protocol):
    """Function that runs a command once per rank on this machine and waits for all of them."""

    def __call__(self, command: Sequence[str], *, nproc: int, device: Device) -> None:
        """Run ``command`` with ``nproc`` ranks; raise a `WorkError` or `InputError` of theirs."""


def environment_rank() -> int | None:
    """Return this process's rank if torchrun or srun has started several, else None."""
    world_size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    return int(rank) if world_size != "1" and rank.isdecimal() else None


def score_file(
    tokens_path: Path,
    out: Path,
    *,
    megatron_path: Path | None = None,
    hf_path: Path | None = None,
    limit: int | None = None,
    ranks: Ranks | None = None,
    start: RankStarter | None = None,
) -> None:
    """Write the logits of one checkpoint, of either kind, for the tokens of a file.

    They grow in a folder beside ``out``.

    Args:
        tokens_path: `.npy` file of token ids `[b, s]`, any integer type.
        out: `.npz` file to write: float32 `logits` `[b, s, v]` and, with an MTP head, `mtp_logits`
            of the same shape (position t predicts token t + 2; the last position is undefined).
        megatron_path, hf_path: checkpoint; exactly one of them.
        limit: score only the first sequences of the file, default all.
        ranks: processes that score a Megatron checkpoint, default this one alone.
        start: starter of several processes.

    Raises:
        InputError: no checkpoint or two, no place to write, unreadable tokens, ids outside the
            vocabulary, a bad checkpoint, ranks that do not fit it, or too little memory.
        WorkError: the disk is too full, or a rank failed.
    """
    if (megatron_path is None) == (hf_path is None):
        raise InputError(
            "score",
            rule="exactly one checkpoint is scored",
            fix="give either --megatron-path or --hf-path",
        )
    # Before the model is loaded, which may take minutes.
    check_writable("--out", out, folder=False)
    if out.exists() and tokens_path.exists() and out.samefile(tokens_path):
        raise InputError(f"--out {out}", rule="is the file of tokens", fix="name another file")
    ranks, tokens = ranks or Ranks(), read_tokens(tokens_path)[:limit]
    if hf_path is not None:
        if ranks.count > 1:
            raise InputError(
                f"--hf-path with {ranks.count} ranks",
                rule="transformers runs in one process",
                fix="leave the layout and --nproc out, or import the folder and score the import",
            )
        with HfFolder.open(hf_path) as folder:
            architecture = folder.architecture
        check_tokens(tokens, architecture)
        require_huggingface_memory(f"--hf-path {hf_path}", architecture, tokens.shape[1])
    else:
        assert megatron_path is not None
        checkpoint = find_checkpoint(megatron_path)
        architecture = checkpoint.architecture
        check_tokens(tokens, architecture)
        check_ranks(architecture, ranks, tokens.shape[1])
    shapes = score_shapes(architecture, tokens, hidden=False)
    # The arrays, and the file that they are copied to.
    with temporary_scores(out.absolute().parent, 2 * score_bytes(shapes)) as temporary:
        folder_path = temporary / "scores"
        if environment_rank():
            assert megatron_path is not None
            score_rank(checkpoint.iteration_dir, tokens, folder_path, ranks)
            return
        scores = ScoreFolder.create(folder_path, shapes)
        if hf_path is not None:
            write_huggingface(hf_path, tokens, scores)
        else:
            score_megatron(checkpoint.iteration_dir, tokens, scores, ranks, start)
        scores.pack(out)


def write_huggingface(hf_path: Path, tokens: torch.Tensor, scores: ScoreFolder) -> None:
    """Write the logits of transformers' model, one sequence after the other."""
    main, mtp = load_hf(hf_path)
    for row, (logits, mtp_logits) in enumerate(score_sequences(main, mtp, tokens)):
        scores.write(LOGITS, row, range(tokens.shape[1]), logits[0])
        if mtp_logits is not None:
            scores.write(MTP_LOGITS, row, range(tokens.shape[1]), mtp_logits[0])
    scores.finish(0)


def score_megatron(
    checkpoint: Path,
    tokens: torch.Tensor,
    scores: ScoreFolder,
    ranks: Ranks,
    start: RankStarter | None,
) -> None:
    """Score sequences on all ranks; `check_ranks` has passed.

    Args:
        checkpoint: one iteration of a checkpoint folder.
        tokens: token ids `[b, s]`.
        scores: arrays to fill.
        ranks: the processes.
        start: starter of several processes; not used if they have been started.
    """
    if ranks.count == 1 or environment_rank() is not None:
        score_rank(checkpoint, tokens, scores.path, ranks)
        return
    if start is None:
        raise TypeError(f"{ranks.count} ranks need a starter")
    np.save(scores.path / _TOKENS_FILE, tokens.numpy())
    job = {"checkpoint": str(checkpoint.absolute()), "ranks": ranks.to_dict()}
    write_json(scores.path / _JOB_FILE, job)
    command = [sys.executable, "-m", "conversion.verification", str(scores.path.absolute())]
    start(command, nproc=ranks.count, device=ranks.resolved_device())


def run_job(folder: Path) -> None:
    """Do one rank's part of `score_megatron`, in a process that it has started."""
    job = json.loads((folder / _JOB_FILE).read_text(encoding="utf-8"))
    tokens = torch.from_numpy(np.load(folder / _TOKENS_FILE))
    score_rank(job["checkpoint"], tokens, folder, Ranks.from_dict(job["ranks"]))


def check_ranks(architecture: Mellum2Architecture, ranks: Ranks, length: int) -> None:
    """Check that the ranks fit the model and, on a CPU, this machine's memory.

    GPU memory is checked by each rank.

    Raises:
        InputError: they do not.
    """
    ranks.validate(architecture, length)
    started = os.environ.get("WORLD_SIZE")
    if environment_rank() is not None and started != str(ranks.count):
        raise InputError(
            f"--nproc {ranks.count} where WORLD_SIZE={started}",
            rule="the ranks have been started already",
            fix="leave --nproc out",
        )
    if ranks.resolved_device() == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
        require_rank_memory(architecture, ranks, length, free=free_memory() // local)


@contextmanager
def temporary_scores(parent: Path | None, nbytes: int) -> Iterator[Path]:
    """Yield a folder for arrays, which is removed at the end.

    Ranks that torchrun or srun has started get the same folder; the first removes it.

    Args:
        parent: folder to make it in; None: the system's temporary folder.
        nbytes: bytes that it will hold.

    Raises:
        InputError: no ``parent`` for ranks on several machines.
        WorkError: the disk is too full.
    """
    rank = environment_rank()
    if rank is not None and parent is None:
        if os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE"):
            raise InputError(
                "verify on ranks of several machines",
                rule="they write to one folder",
                fix="name one that all of them see: --work-dir DIR",
            )
        parent = Path(tempfile.gettempdir())
    if parent is not None:
        check_writable("--work-dir", parent, folder=True)
        parent.mkdir(parents=True, exist_ok=True)
    where = parent or Path(tempfile.gettempdir())
    if rank is None:
        check_space(where, nbytes)
        with staging(where / "mellum2-scores") as path:
            yield path
        return
    # One name for all ranks of this start, and for no other start.
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_PORT")
    start = "-".join(os.environ[name] for name in names if name in os.environ)
    path = where / f".mellum2-scores-{start}"
    if rank == 0:
        check_space(where, nbytes)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    try:
        yield path
    finally:
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def read_tokens(path: Path) -> torch.Tensor:
    """Read token ids `[b, s]` from a `.npy` file.

    Raises:
        InputError: the file cannot be read, or holds no two-dimensional integer array.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"--tokens {path}", rule=f"must be a readable .npy file ({error})", fix="use numpy.save"
        ) from None
    # An .npz archive loads as a mapping.
    is_array = isinstance(array, np.ndarray)
    if not is_array or array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        content = f"{array.dtype} {array.shape}" if is_array else "an .npz archive"
        raise InputError(
            f"--tokens {path}: {content}",
            rule="must be integer token ids of shape [batch, sequence]",
            fix="save such an array with numpy.save",
        )
    # An unsigned id beyond 64 bits must not become a negative one, which the user never wrote.
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(np.iinfo(np.int64).max))
    return torch.from_numpy(array.astype(np.int64))
