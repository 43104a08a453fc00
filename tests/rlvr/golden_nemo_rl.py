"""Write the golden files of `mellum2 rl render-nemo` anew, after an intended change::

python -m tests.rlvr.golden_nemo_rl
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import REPOSITORY
from tests.cli.runner import mellum2

GOLDEN = Path(__file__).with_name("golden") / "nemo_rl"
TASKS = (
    '{"messages": [{"role": "user", "content": "6 * 7?"}], "verifier": "form", '
    '"arguments": {"contains": ["42"]}}\n'
    '{"messages": [{"role": "user", "content": "Say a."}], "verifier": "form", '
    '"arguments": {"contains": ["a"]}, "thinking": true}\n'
)
SITE = """\
account: nlp
partition: h200
time: "1-00:00:00"
gpus_per_node: 8
gpu_request: gres
container: {image: /lustre/nemo-rl.sqsh, runtime: pyxis, mounts: [/]}
variables: {HF_HUB_OFFLINE: "1"}
exclusive: true
sbatch: {constraint: "a b"}
"""
CASES = {
    "instruct_sync": ["mellum2_12b_rlvr_instruct", "--profile", "./site.yaml"],
    "thinking_async": [
        *("mellum2_12b_rlvr_thinking", "--profile", "./site.yaml", "--mode", "async"),
        *("--generation-nodes", "4", "rl.objective.concision_penalty=0.5"),
        "logging.wandb_project=rl",
    ],
    "local": ["mellum2_12b_rlvr_instruct_8gpu_h200_bf16", "--profile", "./node.yaml"],
}


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[None]:
    """Put tasks and profiles in a folder, and work there."""
    for kind in ("instruct", "thinking"):
        data = folder / "data" / f"rlvr_{kind}"
        data.mkdir(parents=True)
        (data / "train.jsonl").write_text(TASKS)
    valid = TASKS.replace("6 * 7", "40 + 2").replace("Say a.", "Spell a word with an a.")
    (folder / "data" / "rlvr_thinking" / "valid.jsonl").write_text(valid)
    (folder / "site.yaml").write_text(SITE)
    (folder / "node.yaml").write_text("executor: local\ngpus_per_node: 8\n")
    with contextlib.chdir(folder):
        yield


def rendered(folder: Path, case: str) -> dict[str, str]:
    """Return the files of a case, with names in place of this machine's paths."""
    result = mellum2("rl", "render-nemo", *CASES[case], "--output", case, "--checkout", "NeMo-RL")
    assert result.code == 0, result
    # Python first: it may lie in the checkout.
    names = {sys.executable: "/PYTHON", os.fspath(folder): "/WORK", os.fspath(REPOSITORY): "/CODE"}
    files = {}
    for file in sorted((folder / case).rglob("*")):
        if file.is_file():
            text = file.read_text()
            for path, name in names.items():
                text = text.replace(path, name)
            files[file.relative_to(folder / case).as_posix()] = text
    return files


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name, work_folder(Path(name).resolve()):
        for one in CASES:
            for path, text in rendered(Path(name).resolve(), one).items():
                (GOLDEN / one / path).parent.mkdir(parents=True, exist_ok=True)
                (GOLDEN / one / path).write_text(text)
