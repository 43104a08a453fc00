"""A corpus plan as job arrays on two nodes: the same bytes as on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from launchers.corpus_arrays import project_folder, submit, write_scripts
from launchers.profile import Profile
from mellum2_megatron.data.pipeline.graph import STAGES, Graph
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.pipeline.run import run_plan
from mellum2_megatron.data.tokens.tokenizer import train_tokenizer
from tests.data.plan_inputs import content, module, write_inputs, write_plan
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]


def test_two_nodes_give_the_bytes_of_one_process(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    write_inputs(tmp_path)
    train_tokenizer(map(module, range(60)), tmp_path / "tokenizer", vocab_size=300)
    file = write_plan(tmp_path, tmp_path / "tokenizer")
    values = yaml.safe_load(file.read_text())
    # The order of the sources is part of a plan.
    text = yaml.safe_dump({**values, "output": "on-slurm"}, sort_keys=False)
    (tmp_path / "slurm.yaml").write_text(text)
    plan = read_plan(tmp_path / "slurm.yaml")
    results = Path(str(plan.output))
    graph = Graph.of(plan, results)
    profile = Profile(name="test", executor="slurm", cpus_per_task=1, gpu_request="none")
    stages = [(name, len(graph.tasks(name)) if name != "packs" else 0) for name in STAGES]
    jobs = write_scripts(
        tmp_path / "slurm.yaml", results, profile, stages, slices=3, code=project_folder()
    )
    submit(jobs)

    local = Graph.of(read_plan(file), tmp_path / "local")
    run_plan(local, workers=1, progress=False)
    end = time.monotonic() + 300
    while slurm.run("squeue", "--noheader", "--format=%T").strip():
        assert time.monotonic() < end, slurm.run("squeue")
        time.sleep(1)
    logs = "".join(path.read_text() for path in sorted((results / "logs").glob("*.log")))
    assert (results / "phase-2" / "phase.json").is_file(), logs
    ignored = ("logs/", "plan.yaml")
    made = {
        name: digest for name, digest in content(results).items() if not name.startswith(ignored)
    }
    expected = content(tmp_path / "local")
    assert made == expected
