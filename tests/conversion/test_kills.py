"""Import, export and release killed while they change the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conversion.convert import export_hf, import_hf
from conversion.jobs.result_folder import partial_folder
from conversion.release.release import release
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.staging import remove_leftovers
from tests.conversion.folders import write_folder
from tests.conversion.test_interruption import contents
from tests.kills import survives_kills


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file but random identifiers, and every folder's name."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {**dict.fromkeys(map(str, paths)), **contents(folder)}


@pytest.fixture(scope="module")
def old_import(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of another model."""
    folder = tmp_path_factory.mktemp("old")
    import_hf(write_folder(folder / "hf", seed=5), folder / "megatron")
    return folder / "megatron"


def test_an_import_over_another_one(hf_folder: Path, old_import: Path, tmp_path: Path) -> None:
    """The old checkpoint or the new one, and a rerun that ends with the new one alone."""
    new = tmp_path / "new"
    import_hf(hf_folder, new)
    results = (contents(old_import), contents(new))

    def check(folder: Path) -> None:
        remove_leftovers(folder)
        assert contents(folder / "out") in results

    survives_kills(
        lambda folder: import_hf(hf_folder, folder / "out", overwrite=True, workers=1),
        tmp_path / "scenes",
        start=lambda folder: shutil.copytree(old_import, folder / "out"),
        check=check,
        kills=10,
        compare=everything,
    )


def test_a_new_export(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing or a complete folder; the same command continues, or refuses and cleans up."""
    whole = tmp_path / "new"
    export_hf(checkpoint, whole)

    def check(folder: Path) -> None:
        assert not (folder / "out").exists() or contents(folder / "out") == contents(whole)

    def again(folder: Path) -> None:
        try:
            export_hf(checkpoint, folder / "out")
        except InputError as error:
            assert "it exists and is not empty" in str(error)  # noqa: PT017

    survives_kills(
        lambda folder: export_hf(checkpoint, folder / "out", workers=1),
        tmp_path / "scenes",
        check=check,
        again=again,
        kills=10,
        compare=everything,
    )


def test_a_release(chat_checkpoint: Path, template: Path, tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        release(
            chat_checkpoint,
            folder / "out",
            member="instruct",
            chat_template=template,
            skip_run=True,
        )

    def check(folder: Path) -> None:
        assert not (folder / "out").exists() or (folder / "out" / "README.md").is_file()

    def again(folder: Path) -> None:
        try:
            work(folder)
        except InputError as error:
            assert "it exists and is not empty" in str(error)  # noqa: PT017

    survives_kills(
        work,
        tmp_path,
        check=check,
        again=again,
        kills=8,
        # The card has the time of the release.
        compare=lambda folder: dict.fromkeys(everything(folder)),
    )


def test_a_finished_partial_folder_goes_and_a_foreign_one_stays(
    hf_folder: Path, tmp_path: Path
) -> None:
    import_hf(hf_folder, tmp_path / "out")
    partial = partial_folder(tmp_path / "out")
    for name, stays in (("journal.jsonl", False), ("thesis.txt", True)):
        partial.mkdir()
        (partial / name).write_text("years of work")
        with pytest.raises(InputError, match="it exists and is not empty"):
            import_hf(hf_folder, tmp_path / "out")
        assert partial.exists() == stays
