"""A Slurm for the session. On a machine without it the tests are skipped, or fail if required."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs

REQUIRED = "MELLUM2_REQUIRE_SLURM"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start one controller and two nodes on this machine."""
    missing = missing_programs()
    if missing:
        reason = (
            f"no Slurm on this machine ({', '.join(missing)} missing); "
            "scripts/setup_slurm.sh installs it"
        )
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
