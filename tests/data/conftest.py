"""A small corpus on disk, of Python-like and of hostile texts, and the folder prepared from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mellum2_megatron.data.prepare import prepare
from mellum2_megatron.data.prepared_folder import PreparedData
from tests.small import python_like

HOSTILE = {
    "emoji": "x = '\U0001f9d1\U0001f3fd\u200d\U0001f680 \u2603 \u00e9 e\u0301 \ufb01'"
    "  # \u202eright-to-left\u202c\n",
    "crlf": "if True:\r\n\tpass\r\n\r\n\rlone return\n",
    "blanks": "  \t leading,   inner    and trailing   \n\n\n   \n",
    "special": "<|endoftext|><fim_prefix>a<fim_suffix>b<fim_middle>"
    "<|startoftext|><|pad|><|im_start|>user<|im_end|><think></think>",
    "numbers": "3.14159 0x1F 1_000_000 \u0663\u0664 \u216f\n",
    "bom": "\ufeff# with a byte order mark\n",
    "unassigned": "\U0003ffff \ue000 \ufffd\n",
    "one": "a",
    "dashes": "=" * 5000 + "\n",
}
NUL = "before\0after\n\0\0"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of forty files, nine hostile ones, and a ``.jsonl`` with five documents."""
    folder = tmp_path_factory.mktemp("texts")
    for seed in range(40):
        path = folder / f"package_{seed % 3}" / f"module_{seed}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(python_like(seed))
    for name, text in HOSTILE.items():
        (folder / f"{name}.txt").write_bytes(text.encode("utf-8"))
    lines = [json.dumps({"text": python_like(seed), "id": seed}) for seed in range(100, 104)]
    (folder / "more.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": NUL})]))
    return folder


@pytest.fixture(scope="session")
def prepared(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Return the folder prepared from ``text_folder`` with a vocabulary of 360, in one process."""
    output = tmp_path_factory.mktemp("prepared") / "corpus"
    return prepare(
        output, inputs=[text_folder], vocab_size=360, workers=1, valid_fraction=0.2, progress=False
    )
