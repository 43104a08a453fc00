"""Recipes of the container images, read and not built: files, steps, versions."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest

from tests import REPOSITORY
from tests.import_reader import TOPS

FOLDER = REPOSITORY / "scripts" / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
DEFINITION = (FOLDER / "mellum2.def").read_text()
INSTALL = (FOLDER / "install.sh").read_text()


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, rest) of each line of the Dockerfile."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def copied() -> list[str]:
    """Return the sources of every COPY."""
    return [
        source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]
    ]


def sections() -> dict[str, list[str]]:
    """Return the lines of each %section of the Apptainer recipe; its header is under ''."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in DEFINITION.splitlines():
        if line.startswith("%"):
            current = line.strip()
            found[current] = []
        elif line.strip() and not line.startswith("#"):
            found[current].append(line.strip())
    return found


def base_image() -> str:
    (image,) = re.findall(r"^ARG CUDA_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    return str(image)


def test_the_dockerfile_has_known_instructions_in_order() -> None:
    words = [word for word, _ in instructions()]
    assert set(words) == {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}
    assert words[:2] == ["ARG", "FROM"]
    assert dict(instructions())["FROM"] == "${CUDA_IMAGE}"
    assert words.index("RUN") > max(i for i, word in enumerate(words) if word == "COPY")


def test_both_images_have_the_same_base_files_and_steps() -> None:
    header = dict(line.split(": ") for line in sections()[""])
    assert header == {"Bootstrap": "docker", "From": base_image()}
    assert [line.split()[0] for line in sections()["%files"]] == copied()
    assert all(line == f"{(s := line.split()[0])} /src/{s}" for line in sections()["%files"])
    (step,) = sections()["%post"]
    assert step.endswith("/src/scripts/containers/install.sh")
    (run,) = [rest for word, rest in instructions() if word == "RUN"]
    assert run.endswith("scripts/containers/install.sh")
    for text in (DOCKERFILE, DEFINITION):
        assert "/opt/mellum2/bin" in text
        assert "MAX_JOBS" in text


def test_every_file_that_an_installation_needs_is_there_and_copied() -> None:
    assert [source for source in copied() if not (REPOSITORY / source).exists()] == []
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {"pyproject.toml", "constraints.txt", "scripts", *TOPS, *project["license-files"]}
    assert needed <= set(copied())
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied())


def test_versions_come_from_the_constraints_alone() -> None:
    installs = [line for line in INSTALL.splitlines() if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (named,) = re.findall(r"'\.\[(.*)\]'", INSTALL)
    assert set(named.split(",")) <= set(extras)
    assert not re.search(r"[=~<>]=\s*\d", INSTALL + DOCKERFILE.replace(base_image(), ""))
    # The compiler of the image and the CUDA libraries of the wheels: one major version.
    (runtime,) = re.findall(
        r"^nvidia-cuda-runtime==(\d+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    )
    (compiler,) = re.findall(r"^nvidia/cuda:(\d+)\.\d+\.\d+-devel-ubuntu24\.04$", base_image())
    assert compiler == runtime
    assert f"core_cu{runtime}" in (REPOSITORY / "scripts" / "setup_te.sh").read_text()


@pytest.mark.parametrize("script", ["scripts/containers/install.sh", "scripts/setup_te.sh"])
def test_the_scripts_are_valid_and_executable(script: str) -> None:
    path = REPOSITORY / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
