"""`checkpoint.load` on a Hugging Face folder: imported once for its content, before any rank."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import conversion.convert
from conversion.huggingface.folder import HfFolder
from launchers.weights import IMPORTS_VARIABLE, WeightsImport, imports_folder, plan_weights
from mellum2_megatron.architecture import to_hf_config
from mellum2_megatron.checkpoint import StartingPoint, find_checkpoint
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import Run, apply_overrides, from_yaml, overridden, to_yaml
from mellum2_megatron.planning.stage_chain import check_predecessor
from tests.cli.runner import mellum2
from tests.conversion.folders import write_folder
from tests.launchers.test_launch_cli import place  # noqa: F401  # fixture

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def hf(run: Run, tmp_path: Path) -> Path:
    """Return a Hugging Face folder of the run's architecture."""
    return write_folder(tmp_path / "hf", to_hf_config(run.architecture))


def loading(run: Run, folder: Path, *more: str) -> Run:
    return apply_overrides(run, [f"checkpoint.load={folder}", *more])


def planned(run: Run, folder: Path, imports: Path) -> tuple[Run, WeightsImport]:
    changed, weights = plan_weights(loading(run, folder), imports)
    assert weights is not None
    return changed, weights


def test_an_import_is_made_once_and_holds_the_folders_weights(
    run: Run, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, weights = planned(run, hf, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()  # planning writes nothing
    assert changed.checkpoint.load == str(weights.target)
    weights.run()
    assert (
        f"importing the Hugging Face folder {hf} into {weights.target}" in capsys.readouterr().err
    )
    checkpoint = find_checkpoint(weights.target)
    assert checkpoint.architecture == HfFolder.open(hf).architecture
    before = {path: path.stat().st_mtime_ns for path in weights.target.rglob("*")}
    again_changed, again = planned(run, hf, tmp_path / "imported")
    again.run()
    assert "was imported before" in capsys.readouterr().err
    assert again_changed == changed
    assert {path: path.stat().st_mtime_ns for path in weights.target.rglob("*")} == before
    # The run's file has where the weights came from.
    (override,) = [line for line in overridden(from_yaml(to_yaml(changed))) if "load" in line]
    assert override.startswith(f"checkpoint.load={hf}; imported from {hf}, sha256 ")


def test_content_names_the_import_not_the_path(run: Run, hf: Path, tmp_path: Path) -> None:
    imports = tmp_path / "imported"
    _, first = planned(run, hf, imports)
    copy = Path(shutil.copytree(hf, tmp_path / "elsewhere" / "hf"))
    assert planned(run, copy, imports)[1].target == first.target
    first.run()
    # Another file of the same size, written later: the remembered hash must not be taken.
    path = hf / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert planned(run, hf, imports)[1].target != first.target


def test_a_remembered_hash_saves_the_reading(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights = planned(run, hf, tmp_path / "imported")
    weights.run()
    monkeypatch.setattr("launchers.weights.hash_files", lambda *_, **__: pytest.fail("hashed"))
    assert planned(run, hf, tmp_path / "imported")[1].target == weights.target


def test_of_two_starts_at_a_time_one_imports(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = conversion.convert.import_hf

    def counted(source: Path, target: Path) -> object:
        calls.append(target)
        return original(source, target)

    monkeypatch.setattr("conversion.convert.import_hf", counted)
    plans = [planned(run, hf, tmp_path / "imported")[1] for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(WeightsImport.run, plans))
    assert calls == [plans[0].target]


def test_a_folder_that_changes_meanwhile_is_not_kept(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = conversion.convert.import_hf

    def changing(source: Path, target: Path) -> object:
        result = original(source, target)
        (source / "generation_config.json").write_text("{}")
        return result

    monkeypatch.setattr("conversion.convert.import_hf", changing)
    _, weights = planned(run, hf, tmp_path / "imported")
    with pytest.raises(WorkError, match="changed while it was imported"):
        weights.run()
    assert not weights.target.exists()


def test_another_architecture_is_refused_with_the_way_to_take_it(run: Run, tmp_path: Path) -> None:
    other = run.architecture.replace(num_experts=6)
    folder = write_folder(tmp_path / "other", to_hf_config(other))
    with pytest.raises(InputError, match="num_experts: 6 there, 4 here") as refusal:
        plan_weights(loading(run, folder), tmp_path / "imported")
    assert refusal.value.fix == f"add architecture={folder}"
    doctor = mellum2("doctor", "run.yaml", f"checkpoint.load={folder}", "--device", "cpu")
    assert (doctor.code, f"add architecture={folder}" in doctor.out) == (2, True), doctor
    _, weights = plan_weights(loading(run, folder, f"architecture={folder}"), tmp_path / "imported")
    assert weights is not None
    # A rotation has no weights, so a longer context may load them.
    longer = loading(run, folder, f"architecture={folder}", "data.sequence_length=64")
    longer = dataclasses.replace(
        longer, architecture=longer.architecture.replace(max_position_embeddings=4096)
    )
    assert plan_weights(longer, tmp_path / "imported")[1] is not None


def test_incomplete_folders_are_refused(run: Run, hf: Path, tmp_path: Path) -> None:
    weights = hf / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(InputError, match="Git LFS pointer"):
        plan_weights(loading(run, hf), tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no weights \(\*.safetensors\)"):
        plan_weights(loading(run, hf), tmp_path)


def test_the_place_is_beside_the_run_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imports_folder(tmp_path / "runs" / "a") == tmp_path / "runs" / "imported"
    monkeypatch.setenv(IMPORTS_VARIABLE, str(tmp_path / "cache"))
    assert imports_folder(tmp_path / "runs" / "a") == tmp_path / "cache"


def test_where_nothing_imports_the_message_has_the_command(run: Run, hf: Path) -> None:
    """A rank, an array's task or a Python script takes the run as it is."""
    start = StartingPoint.of(loading(run, hf))
    with pytest.raises(InputError, match="mellum2 convert import --hf-path") as refusal:
        check_predecessor(loading(run, hf), start)
    assert refusal.value.value == f"checkpoint.load={hf}"
    continuing = apply_overrides(run, [f"checkpoint.continue_from={hf}"])
    with pytest.raises(InputError, match=f"use checkpoint.load={hf}"):
        check_predecessor(continuing)


def test_a_launch_imports_before_it_writes_the_script(run: Run, hf: Path) -> None:
    words = ["launch", "run.yaml", f"checkpoint.load={hf}", "--profile", "site.yaml"]
    words += ["--nodes", "1"]
    shown = mellum2(*words, "--dry-run")
    assert shown.code == 0, shown
    assert f"importing the Hugging Face folder {hf} into" in shown.out
    assert "Would be refused" not in shown.out
    output = Path(str(run.checkpoint.output))
    imports = output.parent / "imported"
    assert not imports.exists()
    # What else is wrong is found before the import.
    refused = mellum2(*words, "data.path=nowhere", "--render", "sbatch")
    assert (refused.code, imports.exists()) == (2, False), refused
    written = mellum2(*words, "--render", "sbatch")
    assert written.code == 0, written
    load = from_yaml((output / "run.yaml").read_text()).checkpoint.load
    assert load is not None
    assert find_checkpoint(load).root.parent == imports
    assert json.loads((imports / ".hashes.json").read_text())[str(hf)]["sha256"][:12] in load


def test_a_run_without_such_a_folder_is_left_alone(run: Run, tmp_path: Path) -> None:
    for word in ("null", str(tmp_path), str(tmp_path / "nowhere")):
        loads = apply_overrides(run, [f"checkpoint.load={word}"])
        assert plan_weights(loads, tmp_path / "imported") == (loads, None)
