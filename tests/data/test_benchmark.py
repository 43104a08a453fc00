"""benchmarks/data.py: figures, ratios and bars of its rows, on little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data import ROWS, Measured
from benchmarks.data_corpus import Corpus
from tests.redis import needs_server
from tests.small import python_like


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    texts = [python_like(seed) for seed in range(200)]
    texts += [text.replace("model", f"word_{number}") for number, text in enumerate(texts)]
    return Corpus(0.5, vocab_size=360, texts=texts)


def test_the_encode_ratio_is_that_of_its_two_figures(corpus: Corpus) -> None:
    found = ROWS["encode"].measure(corpus)
    assert found.facts["engine"] == "tiktoken"
    assert found.facts["megabytes_compared"] == pytest.approx(sum(map(len, corpus.texts)) / 1e6)
    theirs = found.facts["tokenizers_mb_per_cpu_second"]
    assert found.ratio == pytest.approx(found.figure / theirs)
    assert found.met == (found.ratio >= 3.5)


@pytest.mark.parametrize("name", ["filters", "parse", "near", "fill", "order", "read"])
def test_a_row_measures_something(name: str, corpus: Corpus) -> None:
    found = ROWS[name].measure(corpus)
    assert found.figure > 0
    if name == "fill":
        assert found.facts["documents_cut_that_fit"] == 0
        assert found.facts["documents"] == len(corpus.texts)
    if name == "near":
        assert found.met == (found.figure >= 50)
        assert found.ratio == pytest.approx(
            found.figure / found.facts["datasketch_mb_per_cpu_second"]
        )


@needs_server
def test_two_readers_get_all_samples(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "STREAMED", 96)
    found = ROWS["stream"].measure(corpus)
    # The first micro-batch of each reader comes before the clock starts.
    assert found.facts["megabytes"] == pytest.approx(80 * (4 * 8192 + 1024) / 1e6)
    assert set(found.facts["cpu_seconds_per_gb"]) == {"streamer", "server", "readers"}


def test_table_and_json_have_the_rows_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Measured(figure=3.25, unit="MB/s", met=False, reference="other 1.5", facts={"x": 1})
    row = data.Row(bar=">= 60 MB/s", measure=lambda _: made)
    monkeypatch.setitem(ROWS, "filters", row)
    assert data.main(["--only", "filters", "--json", str(tmp_path / "out.json")]) == 0
    words = capsys.readouterr().out.split()
    assert words[words.index("3.25") - 1] == "filters"
    assert "no" in words
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["rows"]) == ["filters"]
    assert found["rows"]["filters"]["figure"] == 3.25
    assert found["machine"]["versions"]["numpy"]
    data.main(["--list"])
    assert all(name in capsys.readouterr().out for name in ["stream"])
