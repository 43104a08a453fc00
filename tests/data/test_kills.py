"""Prepared folders and the folders of phases, killed while they are written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.pipeline.assemble import assemble
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.data.test_plan import folder, plan, ran  # noqa: F401  # fixtures
from tests.kills import contents, survives_kills


def test_a_prepared_folder_appears_complete(
    prepared: PreparedData, text_folder: Path, tmp_path: Path
) -> None:
    def work(place: Path) -> None:
        prepare(
            place / "out",
            inputs=[text_folder],
            tokenizer=prepared.tokenizer_dir,
            workers=1,
            valid_fraction=0.2,
            progress=False,
        )

    def check(place: Path) -> None:
        assert not (place / "out").exists() or (place / "out" / "corpus.json").is_file()

    def again(place: Path) -> None:
        try:
            work(place)
        except InputError:
            check(place)

    survives_kills(work, tmp_path, check=check, again=again, kills=6)


def test_phases_are_the_former_or_the_new_ones(
    ran: Graph,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Assembled over an earlier attempt, and once more after each kill."""
    names = ["phase-1", "phase-2", "tokenizer"]

    def start(place: Path) -> None:
        for entry in ran.results.iterdir():
            if entry.name not in names and entry.is_dir():
                shutil.copytree(entry, place / entry.name, copy_function=_link)
        (place / "phase-1").mkdir()
        (place / "phase-1" / "former").write_text("former")

    def check(place: Path) -> None:
        for name in names:
            found = contents(place / name)
            former = {"former": b"former"} if name == "phase-1" else {}
            assert found in (former, contents(ran.results / name)), name

    survives_kills(
        lambda place: assemble(dataclasses.replace(ran, results=place)),
        tmp_path,
        start=start,
        check=check,
        kills=10,
    )


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
