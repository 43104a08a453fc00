"""Training fed from Redis: the numbers of training fed from files, whatever is killed meanwhile."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from launchers.streaming import streaming
from mellum2_megatron.checkpoint import find_checkpoint
from mellum2_megatron.checkpoint.folder import TRACKER_FILE
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Run, apply_overrides, to_yaml
from mellum2_megatron.data.feed.blend import Blend
from mellum2_megatron.data.feed.continued_training import ContinuedTraining
from mellum2_megatron.data.feed.packed_dataset import PackedDataset
from mellum2_megatron.data.feed.streamed_training import StreamSource, pack_item, unpack_item
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.pack_files import PackShard
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics
from tests.data.packs import entry_of, random_documents, write_pieces
from tests.distributed import DistributedError, run_distributed, start_distributed
from tests.launchers.test_listeners import listeners
from tests.redis import needs_server
from tests.training.test_train import STEPS, losses, small_run, train, weights

REDIS = ["data.feed=redis", "data.stream.window=16", "data.stream.timeout_s=60"]
WORKER = "tests.training.train_worker:train"


def write_run(run: Run) -> Path:
    folder = Path(str(run.checkpoint.output))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(to_yaml(run))
    return folder


@contextmanager
def served(run: Run) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = write_run(run)
    with streaming(run, folder) as environment:
        yield folder, environment


def train_from_redis(run: Run, nproc: int) -> Path:
    with served(run) as (folder, environment):
        arguments = str(folder / "run.yaml")
        run_distributed(WORKER, nproc, arguments, timeout=300, environment=environment)
    return folder


def descendants(name: str) -> list[psutil.Process]:
    """Return the processes of a name, or of a command with it as a word, that this one started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.name() == name or name in process.cmdline():
                found.append(process)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def last_step(folder: Path) -> int:
    if not (folder / METRICS_FILE).exists():
        return 0
    records = read_metrics(folder / METRICS_FILE)
    return max((record.step for record in records if record.kind == "train"), default=0)


@needs_server
@pytest.mark.distributed
@pytest.mark.slow
def test_kills_of_server_streamer_and_rank_change_no_number(
    trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """The same run as `trained`, which reads files, on the same two ranks."""
    run = small_run(small_data, tmp_path / "run", *REDIS)
    with served(run) as (folder, environment):
        world = start_distributed(
            WORKER, 2, str(folder / "run.yaml"), folder=tmp_path, environment=environment
        )
        try:
            for step, name in enumerate(("redis-server", "stream"), 1):
                wait_for(lambda step=step: last_step(folder) >= step)
                (process,) = descendants(name)
                process.kill()
                wait_for(lambda name=name, old=process: old not in descendants(name))
            # Megatron also saves after step 2, before the batch grows.
            wait_for(lambda: (folder / TRACKER_FILE).exists() and last_step(folder) >= 3)
            wait_for(lambda: descendants("stream"))
            (keeper,) = descendants("launchers.stream_keeper")
            found = listeners(keeper)
            os.kill(int(world.processes[1].pid or 0), signal.SIGKILL)
            with pytest.raises(DistributedError):
                world.results(timeout=60)
        finally:
            world.kill()
    assert not descendants("redis-server")
    assert not descendants("stream")
    log = (folder / "stream" / "keeper.log").read_text()
    assert "redis ended with -9" in log
    assert "streamer ended with -9" in log
    assert found
    assert all(ipaddress.ip_address(ip).is_loopback for ip in found)
    assert find_checkpoint(folder).iteration in (2, 3)
    train_from_redis(run, 2)
    assert last_step(folder) == STEPS
    for name in ("lm_loss", "mtp_loss", "grad_norm"):
        assert losses(folder, name) == losses(trained, name), name
    assert losses(folder, kind="valid") == losses(trained, kind="valid")
    expected, got = weights(trained), weights(folder)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@needs_server
@pytest.mark.distributed
@pytest.mark.slow
def test_resume_on_more_ranks_reads_the_same_samples(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """Three steps on one rank, three more on two; from files, and from Redis without workers."""
    half = ["schedule.train_samples=16", "schedule.horizon_samples=40"]
    of_files = small_run(small_data, tmp_path / "files", "layout.ep=1")
    of_redis = small_run(small_data, tmp_path / "redis", "layout.ep=1", *REDIS, "data.workers=0")
    train(apply_overrides(of_files, half), 1)
    train_from_redis(apply_overrides(of_redis, half), 1)
    train(of_files, 2)
    train_from_redis(of_redis, 2)
    assert losses(tmp_path / "redis") == losses(tmp_path / "files")
    assert last_step(tmp_path / "redis") == STEPS


@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
def test_compact_form_gives_packs_back(documents: bool, tmp_path: Path) -> None:
    pieces = random_documents(3, count=60, longest=40, vocabulary=96)
    write_pieces(tmp_path / "shard", pieces, length=64, vocabulary=96, align=4)
    packs = PackedDataset(
        [entry_of(PackShard(tmp_path / "shard"))],
        samples=None,
        key=1,
        index_split=None,
        document_attention=documents,
    )
    for index in range(len(packs)):
        item = packs[index]
        assert not {"labels", "position_ids", "loss_mask"} & set(pack_item(item))
        assert_same(unpack_item(pack_item(item)), item)
    # The streamer builds no items of packs, neither of a blend nor of a later phase.
    blend = Blend([packs, packs], lambda sample: (sample % 2, sample // 2), 2 * len(packs))
    for dataset, first in ((packs, 0), (blend, 0), (ContinuedTraining(blend, first=7), 7)):
        source = StreamSource(dataset)
        assert len(source) == len(dataset)
        for index in range(first, len(dataset)):
            found, wanted = source[index], pack_item(dataset[index])
            assert set(found) == set(wanted)
            assert all(found[name].dtype == wanted[name].dtype for name in wanted)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(IndexError):
        source[6]


@pytest.mark.parametrize("name", ["labels", "position_ids", "loss_mask", "tokens"])
def test_compact_form_gives_any_item_back(name: str) -> None:
    tokens = torch.arange(1, 20)
    item = {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(19),
        "position_ids": torch.arange(19),
        "source": torch.tensor(3),
    }
    assert set(pack_item(item)) == {"tokens", "mask", "last", "source"}
    item[name][7] = 4
    if name == "loss_mask":
        item[name][8] = 0.5
    assert_same(unpack_item(pack_item(item)), item)


def assert_same(found: dict[str, torch.Tensor], item: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(item)
    for name, tensor in item.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@needs_server
def test_streamer_that_cannot_work_ends_the_wait_with_its_message(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """The data vanish after the launcher has looked."""
    from mellum2_megatron.data.feed.redis_client import RedisReader
    from mellum2_megatron.data.feed.redis_run import keys_of, run_stream
    from mellum2_megatron.data.feed.sources import check_data

    run = small_run(small_data, tmp_path / "run", *REDIS)
    data = check_data(run)
    gone = apply_overrides(run, [f"data.path={tmp_path / 'gone'}"])
    with served(gone) as (folder, environment), pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(environment.items())))
        reader = RedisReader(
            run_stream(run, folder),
            keys_of(run, data, folder),
            40,
            name="rank0",
            finish=dict,
            failure=folder / "stream" / "failure.txt",
        )
        with pytest.raises(WorkError, match=r"streamer ended with 2: error: data.path=.*/gone"):
            reader[0]


@needs_server
def test_named_server_is_asked_before_the_ranks_start(
    small_data: PreparedData, tmp_path: Path
) -> None:
    run = small_run(small_data, tmp_path / "run", *REDIS)
    with served(run) as (folder, environment):
        url = f"data.stream.url={environment['MELLUM2_STREAM_URL']}"
        other = apply_overrides(run, [url, f"checkpoint.output={tmp_path / 'other'}"])
        # The server of the first run wants a password.
        with pytest.raises(InputError, match="refuses user trainer"), served(other):
            pass
    with pytest.raises(WorkError, match="does not answer"), served(other):
        pass
    assert not (tmp_path / "other" / "stream" / "keeper.log").exists()
    shutil.rmtree(folder)
