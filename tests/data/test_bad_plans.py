"""Plans that cannot work are refused before anything is written; those of the pages can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.data.pipeline.graph import Graph
from mellum2_megatron.data.pipeline.plan_file import read_plan
from mellum2_megatron.data.prepared_folder import PreparedData
from tests import REPOSITORY
from tests.data.plan_inputs import write_inputs, write_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    write_inputs(made)
    return made


@pytest.mark.parametrize("page", ["data.md", "corpus_plans.md"])
def test_the_plans_in_the_documentation_can_be_read(page: str, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / page).read_text()
    plans = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "phases:" in block]
    assert plans
    for number, block in enumerate(plans):
        head = "" if "name:" in block else "name: example\ntokenizer: tokenizer\n"
        path = tmp_path / f"plan-{number}.yaml"
        path.write_text(head + block)
        assert read_plan(path).phases


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sourcs": {}}, "did you mean 'sources'"),
        ({"sources": {}}, "sources is empty"),
        ({"sources": {"code": {"kind": "code", "inputs": []}}}, r"sources\.code\.inputs=\[\]"),
        ({"sources": {"code": {"kind": "cod", "inputs": ["tree"]}}}, r"sources\.code\.kind"),
        (
            {"sources": {"code": {"kind": "code", "inputs": ["none"]}},
             "phases": [{"tokens": 5, "mixture": {"code": 100}}]},
            "no such file or folder",
        ),
        (
            {"sources": {"code": {"kind": "code", "inputs": ["tree"], "filters": {"Lines": {}}}}},
            r"sources\.code\.filters\.Lines",
        ),
        (
            {"sources": {"code": {"kind": "code", "inputs": ["tree"],
                                  "filters": {"LineLength": {"men": 3}}}}},
            "did you mean 'mean'",
        ),
        ({"phases": [{"tokens": 5, "mixture": {"code": 60, "web": 30}}]}, "adds up to 90"),
        ({"phases": [{"tokens": 5, "mixture": {"cod": 100}}]}, "did you mean 'code'"),
        ({"phases": [{"tokens": 0, "mixture": {"code": 100}}]}, r"phases\.1\.tokens=0"),
        ({"phases": [{"tokens": 5, "mixture": {"code": 100}, "fim": {"rate": 2}}]}, "fim.rate=2"),
        ({"phases": [{"tokens": 5, "mixture": {"code": 100}, "align": 3}]}, "align=3"),
        ({"phases": [{"tokens": 10**16, "mixture": {"code": 100}}]}, "must not exceed"),
        ({"sources": {"../code": {"kind": "code", "inputs": ["tree"]}}}, "becomes a folder"),
        ({"sources": {"a\nb": {"kind": "code", "inputs": ["tree"]}}}, "becomes a folder"),
        ({"sources": {"": {"kind": "code", "inputs": ["tree"]}}}, "becomes a folder"),
        ({"output": "a\0b"}, "output="),
        ({"output": ""}, "output="),
        ({"output": "."}, "the plan .*plan.yaml lies in it"),
        ({"output": "tree"}, r"sources\.code\.inputs: .*tree lies in it"),
        ({"output": "tree/corpus"}, r"inside sources\.code\.inputs"),
        (
            {"sources": {"code": {"kind": "code", "inputs": ["~no-such-user/tree"]}},
             "phases": [{"tokens": 5, "mixture": {"code": 100}}]},
            "no such file or folder",
        ),
        (
            {"phases": [{"tokens": 5, "mixture": {"code": 100}, "sequence_length": 10**12}]},
            "sequence_length=1000000000000",
        ),
        (
            {"phases": [{"tokens": 5, "mixture": {"code": 100}, "unique_tokens": 10**5}]},
            r"phases\.1\.unique_tokens=100000",
        ),
        ({"unique_tokens": -5}, "unique_tokens=-5"),
        ({"seed": 10**40}, "seed=1000"),
        ({"near_duplicates": {"bands": 10**5, "rows": 10**5}}, "100000 bands"),
        ({"valid_share": 0.9}, "valid_share=0.9"),
        ({"eod": "<none>"}, "eod: <none>: it must be an added token"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused(
    changes: dict[str, Any], message: str, folder: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        Graph.of(
            read_plan(write_plan(folder, prepared.tokenizer_dir, **changes)), tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()
