"""Checkpoints: state after a resume, on the same layout and on others; manifests; pruning."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from mellum2_megatron.checkpoint import StartingPoint, check_run_folder, find_checkpoint
from mellum2_megatron.checkpoint.checks import check_share
from mellum2_megatron.checkpoint.file_manifest import (
    MANIFEST_FILE,
    check_hashes,
    check_sizes,
    hash_files,
    read_manifest,
)
from mellum2_megatron.checkpoint.folder import (
    TRACKER_FILE,
    is_complete,
    iteration_folder_name,
    iteration_folders,
    write_tracker,
)
from mellum2_megatron.checkpoint.saving import (
    remove_old,
    remove_partial_checkpoints,
    with_retention,
)
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Checkpoint, Run, to_yaml
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.distributed import run_distributed
from tests.training.test_train import losses, small_run, train

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

TENSORS_OF_OPTIMIZER = ("fp32_param", "momentum_buffer", "exp_avg", "exp_avg_sq")


def state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors and all objects of a checkpoint by key, read by torch alone."""
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    values: dict[str, Any] = {
        key: torch.full(entry.size, -1, dtype=entry.properties.dtype)
        if hasattr(entry, "size")
        else io.BytesIO()
        for key, entry in entries.items()
    }
    load(values, storage_reader=reader, no_dist=True)
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, {key: value for key, value in values.items() if key not in tensors}


def equal(one: Any, other: Any) -> bool:
    """Deep equality that takes tensors and arrays."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def at_step(source: Path, output: Path, step: int) -> Path:
    """Copy a run's folder as it was after a step."""
    shutil.copytree(source, output)
    for folder in iteration_folders(output):
        if folder.name > iteration_folder_name(step):
            shutil.rmtree(folder)
    write_tracker(output, step)
    return output


def resume(run: Run, nproc: int, copy: Path) -> Path:
    """Resume a run at step 3, and save the loaded state into ``copy`` before its first step.

    Returns the checkpoint with that state.
    """
    reload(run, nproc, copy, worker="reload")
    return copy / iteration_folder_name(3)


def reload(run: Run, nproc: int, copy: Path, *, worker: str) -> list[Any]:
    """Resume a run, as `resume` does, and return what the worker returns on each rank."""
    file = Path(str(run.checkpoint.output)) / "requested.yaml"
    file.write_text(to_yaml(run))
    return run_distributed(
        f"tests.faults.fault_worker:{worker}", nproc, str(file), str(copy), timeout=300
    )


def test_resume_restores_every_value(
    trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """On the same layout: the loaded state, the state three steps later, and the logged values."""
    run = small_run(small_data, at_step(trained, tmp_path / "run", 3))
    loaded = resume(run, 2, tmp_path / "copy")
    for expected, found in (
        (trained / "iter_0000003", loaded),
        (trained / "iter_0000006", tmp_path / "run" / "iter_0000006"),
    ):
        tensors, objects = state(expected)
        found_tensors, found_objects = state(found)
        assert all(any(name in key for key in tensors) for name in TENSORS_OF_OPTIMIZER)
        assert equal(tensors, found_tensors)
        common, found_common = (
            objects["common_state/shard_0_1"][0],
            found_objects["common_state/shard_0_1"][0],
        )
        for key in ("iteration", "opt_param_scheduler", "num_floating_point_operations_so_far"):
            assert common[key] == found_common[key], key
        assert (
            common["args"].consumed_train_samples == found_common["args"].consumed_train_samples > 0
        )
        # Steps and learning rates: those are no tensors.
        assert equal(common["optimizer"], found_common["optimizer"])
        generators = {key for key in objects if key.startswith("rng_state")}
        assert generators
        assert all(equal(objects[key], found_objects[key]) for key in generators)
    for name in (
        "lm_loss",
        "mtp_loss",
        "aux_loss",
        "z_loss",
        "grad_norm",
        "learning_rate",
        "samples",
    ):
        assert losses(tmp_path / "run", name) == losses(trained, name), name


@pytest.mark.parametrize(
    ("layout", "nproc"),
    [
        (["layout.ep=1"], 1),
        (["layout.ep=1", "layout.pp=2"], 2),
        (["layout.ep=1", "layout.tp=2", "layout.sp=true", "optimizer.muon_tp_mode=duplicated"], 2),
        (["layout.ep=2", "layout.pp=2"], 4),
        (["layout.ep=1", "layout.etp=2"], 2),
    ],
    ids=["one_process", "pp2", "tp2", "ep2_pp2", "etp2"],
)
def test_resume_on_another_layout_restores_every_value(
    layout: list[str],
    nproc: int,
    trained: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    """Two ranks that share the experts save; state is equal to the bit, next losses to rounding."""
    require_equal_resume(
        trained, small_run(small_data, at_step(trained, tmp_path / "run", 3), *layout), nproc
    )


def writers(folder: Path, name: str) -> set[str]:
    """Ranks that wrote the tensors whose key ends with ``name``."""
    places = FileSystemReader(folder).read_metadata().storage_data
    return {
        place.relative_path.split("_")[2] for index, place in places.items() if name in index.fqn
    }


def test_one_rank_gathers_what_all_did(
    trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """A save with `gather_on_one_rank` has the same content, by one writer, for any layout."""
    gathering = small_run(
        small_data, at_step(trained, tmp_path / "run", 3), "checkpoint.gather_on_one_rank=true"
    )
    saved = resume(gathering, 2, tmp_path / "copy")
    assert equal(state(trained / "iter_0000003")[0], state(saved)[0])
    assert writers(trained / "iter_0000003", "exp_avg") == {"0", "1"}
    assert writers(saved, "exp_avg") == {"0"}
    assert losses(tmp_path / "run") == losses(trained)
    # The three steps after it, loaded and saved in the same way.
    assert equal(state(trained / "iter_0000006")[0], state(tmp_path / "run" / "iter_0000006")[0])
    other = at_step(trained, tmp_path / "other", 3)
    shutil.rmtree(other / "iter_0000003")
    shutil.copytree(saved, other / "iter_0000003")
    tp2 = ["layout.ep=1", "layout.tp=2", "layout.sp=true", "optimizer.muon_tp_mode=duplicated"]
    require_equal_resume(trained, small_run(small_data, other, *tp2), 2)


def test_ranks_with_the_same_experts_read_gather_and_plan_once(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """Four ranks, of which two and two hold the same experts, and Adam for all weights.

    The content of every checkpoint is that of a run in which each rank reads and plans for itself.
    """
    words = [
        "optimizer.name=adam",
        "schedule.batch_schedule=[[0,8]]",
        "schedule.train_samples=48",
        "checkpoint.save_interval=1",
    ]
    alone = ["checkpoint.parallel_load=false", "checkpoint.reuse_plans=false"]
    four = train(small_run(small_data, tmp_path / "run", *alone, *words), nproc=4)
    run = small_run(
        small_data,
        at_step(four, tmp_path / "again", 3),
        "checkpoint.gather_on_one_rank=true",
        *words,
    )
    counts = reload(run, 4, tmp_path / "copy", worker="count_reload")
    saved = tmp_path / "copy" / iteration_folder_name(3)
    assert equal(state(four / "iter_0000003")[0], state(saved)[0])
    for step in (4, 5, 6):
        folder = iteration_folder_name(step)
        assert equal(state(four / folder)[0], state(tmp_path / "again" / folder)[0])
    assert losses(tmp_path / "again") == losses(four)
    # Once for each pair, of which the experts are each other's complement.
    sizes = stored_bytes(four / "iter_0000003")
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert sum(read for read, _ in counts) == 2 * sum(sizes.values()) - experts
    # Of four saves: the copy, for which Megatron keeps nothing, and the first of the other three.
    assert [planned for _, planned in counts] == [2] * 4
    assert writers(four / "iter_0000003", "exp_avg_sq.decoder.layers.mlp.experts") == set("0123")
    assert writers(saved, "exp_avg_sq.decoder.layers.mlp.experts") == set("01")
    assert writers(saved, "exp_avg_sq.output_layer") == {"0"}


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint, as it is stored."""
    metadata = FileSystemReader(folder).read_metadata()
    sizes = dict.fromkeys(
        (key for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")), 0
    )
    for index, place in metadata.storage_data.items():
        if index.fqn in sizes:
            sizes[index.fqn] += place.length
    return sizes


@pytest.fixture(scope="module")
def of_dp2(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of two ranks that have all experts, each of which sees other sequences."""
    return train(
        small_run(small_data, tmp_path_factory.mktemp("dp2") / "run", "layout.ep=1"), nproc=2
    )


@pytest.fixture(scope="module")
def of_cp2(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of two ranks that have all experts, each of which sees half of every sequence."""
    return train(
        small_run(small_data, tmp_path_factory.mktemp("cp2") / "run", "layout.ep=1", "layout.cp=2"),
        nproc=2,
    )


@pytest.mark.parametrize(
    ("source", "cp", "nproc"),
    [("of_dp2", 1, 1), ("of_dp2", 2, 2), ("of_cp2", 1, 1), ("of_cp2", 1, 2)],
    ids=["dp2_to_one_process", "dp2_to_cp2", "cp2_to_one_process", "cp2_to_dp2"],
)
def test_resume_across_data_and_context_parallelism(
    source: str,
    cp: int,
    nproc: int,
    request: pytest.FixtureRequest,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    saved: Path = request.getfixturevalue(source)
    run = small_run(
        small_data, at_step(saved, tmp_path / "run", 3), "layout.ep=1", f"layout.cp={cp}"
    )
    require_equal_resume(saved, run, nproc)


def require_equal_resume(source: Path, run: Run, nproc: int) -> None:
    """Resume a run of another layout at step 3: same state to the bit, same losses to rounding."""
    output = Path(str(run.checkpoint.output))
    loaded = resume(run, nproc, output.with_name("copy"))
    tensors, objects = state(source / "iter_0000003")
    found, found_objects = state(loaded)
    assert equal(tensors, found)
    common, found_common = (
        objects["common_state/shard_0_1"][0],
        found_objects["common_state/shard_0_1"][0],
    )
    assert common["opt_param_scheduler"] == found_common["opt_param_scheduler"]
    assert steps(found_common["optimizer"]) == steps(common["optimizer"]) == {3}
    # Seen on ten pairs of layouts: 2.3e-4 and 1e-4 of the losses, 4.7e-3 of the norm.
    for name, within in (("lm_loss", 1e-3), ("mtp_loss", 5e-4), ("grad_norm", 1.5e-2)):
        expected, seen = losses(source, name), losses(output, name)
        assert seen.keys() == expected.keys()
        assert seen == pytest.approx(expected, rel=within), name


def test_resume_with_expert_tensor_parallelism(
    of_dp2: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """Experts get data-parallel ranks of their own; before, they shared the other weights'."""
    run = small_run(small_data, at_step(of_dp2, tmp_path / "run", 3), "layout.ep=1", "layout.etp=2")
    require_equal_resume(of_dp2, run, 2)


def test_resume_back_to_expert_parallelism(
    trained: Path, small_data: PreparedData, tmp_path: Path
) -> None:
    """One process writes one parameter group less than two expert-parallel ranks have."""
    alone = small_run(
        small_data,
        at_step(trained, tmp_path / "alone", 3),
        "layout.ep=1",
        "checkpoint.save_interval=4",
    )
    resume(alone, 1, tmp_path / "copy")
    wrote = tmp_path / "alone" / "iter_0000004"
    run = small_run(small_data, at_step(tmp_path / "alone", tmp_path / "back", 4))
    file = tmp_path / "back" / "requested.yaml"
    file.write_text(to_yaml(run))
    run_distributed(
        "tests.faults.fault_worker:reload", 2, str(file), str(tmp_path / "again"), timeout=300
    )
    groups = [
        len(muon_groups(state(folder)[1]))
        for folder in (wrote, tmp_path / "again" / "iter_0000004")
    ]
    assert groups == [1, 2]
    assert equal(state(wrote)[0], state(tmp_path / "again" / "iter_0000004")[0])
    assert losses(tmp_path / "back") == pytest.approx(losses(trained), rel=1e-4)  # seen: 1.2e-5


def muon_groups(objects: dict[str, Any]) -> list[dict[str, Any]]:
    optimizer = objects["common_state/shard_0_1"][0]["optimizer"]
    groups: list[dict[str, Any]] = optimizer[0]["optimizer"]["param_groups"]
    return groups


def steps(value: Any) -> set[Any]:
    """Collect Adam's step counts from a nested state."""
    if isinstance(value, dict):
        return {value["step"]} if "step" in value else set().union(*map(steps, value.values()))
    return set().union(*map(steps, value)) if isinstance(value, list) else set()


# -- Manifests


@pytest.mark.parametrize("later", [False, True], ids=["at_once", "in_the_background"])
def test_every_rank_hashes_what_it_wrote(later: bool, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    (folder / "__7_0.distcp").write_text("of an earlier save, by more ranks")
    (folder / MANIFEST_FILE).write_text("{}")
    run_distributed("tests.faults.fault_worker:write_manifest", 2, str(folder), later)
    files = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST_FILE
    }
    assert sorted(files) == [
        ".metadata",
        *(f"__{rank}_{n}.distcp" for rank in (0, 1) for n in (0, 1)),
        "metadata.json",
    ]
    assert json.loads((folder / MANIFEST_FILE).read_text()) == {
        "algorithm": "sha256",
        "files": {
            name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())
        },
        "sizes": {name: len(content) for name, content in sorted(files.items())},
    }


def test_megatron_reads_the_manifest(trained: Path) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import _verify_integrity_manifest_impl

    for folder in iteration_folders(trained):
        assert len(read_manifest(folder) or {}) == len(list(folder.iterdir())) - 1
        _verify_integrity_manifest_impl(str(folder))
    with pytest.raises(CheckpointingException):
        _verify_integrity_manifest_impl(str(trained))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flipped_byte": (flip, "__1_0.distcp has changed since it was written"),
    "truncated": (cut, "__1_0.distcp has"),
    "missing": (Path.unlink, "__1_0.distcp is missing"),
}


def check(run: Run) -> None:
    """Run the checks that two ranks make before they train."""
    start = StartingPoint.of(run)
    check_run_folder(run, start)
    for rank in range(2):
        check_share(run, start, rank=rank, world_size=2)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_previous_checkpoint_offered(
    damage: str,
    trained: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    harm, named = DAMAGE[damage]
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    run = small_run(small_data, output)
    check(run)
    harm(output / "iter_0000006" / "__1_0.distcp")
    with pytest.raises(InputError, match=named) as caught:
        check(run)
    assert f"go back to iter_0000003 with `echo 3 > {output / TRACKER_FILE}`" in caught.value.fix
    (output / TRACKER_FILE).write_text("3\n")  # what the command does
    check(run)
    shutil.rmtree(output / "iter_0000002")
    harm(output / "iter_0000003" / "__1_0.distcp")
    with pytest.raises(InputError, match=named) as caught:
        check(run)
    assert "there is no earlier one" in caught.value.fix
    # A run that only takes the weights is told as well.
    with pytest.raises(InputError, match=named):
        check(small_run(small_data, tmp_path / "new", f"checkpoint.load={output}"))
    with pytest.raises(InputError, match=named):
        check(small_run(small_data, tmp_path / "new", f"checkpoint.continue_from={output}"))


def test_amount_of_checking_is_an_option(
    trained: Path,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    flip(output / "iter_0000006" / "__1_0.distcp")
    check(small_run(small_data, output, "checkpoint.verify=size"))
    with pytest.raises(InputError, match="has changed"):
        check(small_run(small_data, output))
    cut(output / "iter_0000006" / "__1_0.distcp")
    check(small_run(small_data, output, "checkpoint.verify=off"))
    with pytest.raises(InputError, match="bytes"):
        check(small_run(small_data, output, "checkpoint.verify=size"))


def test_damaged_manifest_counts_as_damage(trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    manifest = output / "iter_0000006" / MANIFEST_FILE
    for text in ("{", "[]", '{"algorithm": "md5", "files": {}}', '{"algorithm": "sha256"}'):
        manifest.write_text(text)
        with pytest.raises(InputError, match="must be a manifest"):
            check_sizes(find_checkpoint(output))


def test_a_checkpoint_without_a_manifest_is_taken_with_a_warning(
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    (output / "iter_0000006" / MANIFEST_FILE).unlink()
    check_sizes(find_checkpoint(output))
    for part in range(2):
        check_hashes(find_checkpoint(output), part=part, parts=2)
    assert len(caplog.messages) == 1
    assert f"has no {MANIFEST_FILE}" in caplog.messages[0]


def test_shares_cover_every_file_once(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record(files: Any, **options: Any) -> Any:
        paths = list(files)
        seen.extend(path.name for path in paths)
        return hash_files(paths, **options)

    monkeypatch.setattr("mellum2_megatron.checkpoint.file_manifest.hash_files", record)
    for part in range(3):
        check_hashes(find_checkpoint(trained), part=part, parts=3)
    assert sorted(seen) == sorted(read_manifest(trained / "iter_0000006") or {})


# -- Pruning


def checkpoints(root: Path, *numbers: int, tracked: int) -> None:
    for number in numbers:
        (root / iteration_folder_name(number)).mkdir()
        (root / iteration_folder_name(number) / "metadata.json").write_text("{}")
    write_tracker(root, tracked)


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "left"),
    [
        (None, None, [1, 2, 3, 4, 5, 6, 9]),
        (2, None, [5, 6, 9]),
        (1, 3, [3, 6, 9]),
        (None, 3, [3, 6, 9]),
        (2, 2, [2, 4, 5, 6, 9]),
        (9, None, [1, 2, 3, 4, 5, 6, 9]),
    ],
)
def test_old_checkpoints_are_pruned(
    keep_last: int | None, retain_interval: int | None, left: list[int], tmp_path: Path
) -> None:
    checkpoints(tmp_path, 1, 2, 3, 4, 5, 6, 9, tracked=6)  # someone has set the tracker back from 9
    remove_old(tmp_path, keep_last=keep_last, retain_interval=retain_interval)
    assert [folder.name for folder in iteration_folders(tmp_path)] == [
        iteration_folder_name(n) for n in left
    ]
    assert not list(tmp_path.glob(".*"))


def test_a_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron saves a step twice where the batch grows, the second time over the first save."""
    calls: list[int] = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    settings = Checkpoint(output=str(tmp_path), keep_last=1)
    save = with_retention(
        lambda iteration, *_: calls.append(iteration),
        settings=settings,
        paused=contextlib.nullcontext,
    )
    checkpoints(tmp_path, 2, 3, tracked=3)
    for iteration in (2, 2, 3):
        save(iteration, "model")
    assert calls == [2, 3]
    assert [folder.name for folder in iteration_folders(tmp_path)] == ["iter_0000003"]


def test_a_fragment_is_never_taken_and_is_removed_at_the_next_start(
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    fragment, legacy = output / "iter_0000009", output / "iter_0000008"
    fragment.mkdir()
    (fragment / "__0_0.distcp").write_text("half")
    (legacy / "mp_rank_00").mkdir(parents=True)  # complete, in Megatron's older format
    assert find_checkpoint(output).iteration == 6
    with pytest.raises(
        InputError, match=r"half a checkpoint.*complete: iter_0000002, iter_0000003, iter_0000006"
    ):
        find_checkpoint(fragment)
    remove_partial_checkpoints(output)
    assert not fragment.exists()
    assert legacy.exists()
    assert all(is_complete(output / iteration_folder_name(number)) for number in (3, 6))
    assert [str(fragment) in message for message in caplog.messages] == [True]
