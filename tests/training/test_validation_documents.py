"""Sums of a validation by document: the same in every layout, and equal to the logged loss."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from mellum2_megatron.config import Run
from mellum2_megatron.data.feed.sources import check_data
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.data.tokens.indexed_files import read_indexed
from mellum2_megatron.data.tokens.tokenizer import load_tokenizer
from mellum2_megatron.metrics.validation_sums import ValidationSums, read_sums, sums_files
from tests.data.packs import write_folder
from tests.training.test_train import losses, small_run, train

pytestmark = pytest.mark.distributed

SHORT = (
    "logging.validation_documents=true",
    "logging.eval_interval=1",
    "logging.eval_batch_size=4",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.train_samples=8",
    "schedule.warmup_samples=0",
    "schedule.decay_samples=4",
    "optimizer.lr=1e-12",
    "schedule.micro_batch_size=1",
    "layout.ep=1",
)
FIRST = ("schedule.train_samples=4", "schedule.horizon_samples=8")


def sums(run: Run) -> tuple[ValidationSums, Path]:
    folder = train(run, 1)
    files = sums_files(folder)
    assert list(files) == [1]
    return read_sums(files[1]), folder


def resumed(run: Run, nproc: int, before: Path) -> ValidationSums:
    """Return the sums after one more step, whose learning rate changes nothing."""
    folder = Path(str(run.checkpoint.output))
    shutil.copytree(before, folder)
    (folder / "requested.yaml").unlink()
    # A killed process has validated step 2 and a later one, which this run does not have.
    for step in (2, 9):
        shutil.copy(sums_files(folder)[1], folder / "validation" / f"step_{step:07d}.npz")
    train(run, nproc)
    files = sums_files(folder)
    assert list(files) == [1, 2]
    return read_sums(files[2])


def assert_equal(got: ValidationSums, expected: ValidationSums) -> None:
    assert got.corpora == expected.corpora
    for name in ("document", "corpus", "tokens", "bytes", "position_start", "position_tokens"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    # BF16 rounds; a token counted for another document would change a sum by a hundredth.
    for name in ("nats", "position_nats"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=5e-4)


def assert_is_logged(got: ValidationSums, folder: Path) -> None:
    assert got.loss == pytest.approx(losses(folder, kind="valid")[1], rel=1e-5)
    for number, name in enumerate(got.corpora):
        of_set = got.corpus == number
        loss = got.nats[of_set].sum() / got.tokens[of_set].sum()
        if len(got.corpora) > 1:
            assert loss == pytest.approx(losses(folder, f"lm_loss/{name}", "valid")[1], rel=1e-5)
        assert got.position_nats[number].sum() == pytest.approx(got.nats[of_set].sum())
        assert got.position_tokens[number].sum() == got.tokens[of_set].sum()


def test_documents_of_windows(small_data: PreparedData, tmp_path: Path) -> None:
    one, folder = sums(small_run(small_data, tmp_path / "one", *SHORT, *FIRST))
    assert_is_logged(one, folder)
    # Two batches of four windows; each place of a window is in one bucket.
    assert one.tokens.sum() == 8 * 64
    assert one.position_start.tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert one.position_tokens.tolist() == [[8, 8, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128]]
    assert len(one.document) > 1
    # The documents themselves: no more of them scored than they have, text as long as they are.
    tokenizer = load_tokenizer(small_data.tokenizer_dir)
    data = check_data(small_run(small_data, folder))
    stream = np.asarray(read_indexed(data.valid[0].prefix, "valid").stream())
    ends = np.flatnonzero(stream == data.tokenizer.eod)
    for document, tokens, size in zip(one.document, one.tokens, one.bytes, strict=True):
        first = 0 if document == 0 else ends[int(document) - 1] + 1
        whole = stream[first : ends[int(document)] + 1]
        text = tokenizer.decode(whole[:-1].tolist(), skip_special_tokens=False)
        assert tokens <= len(whole)
        assert size <= len(text.encode())
        if tokens == len(whole):
            assert size == len(text.encode())
    assert one.bits_per_byte == pytest.approx(one.nats.sum() / math.log(2) / one.bytes.sum())

    layout = ("layout.tp=2", "layout.sp=true")
    assert_equal(resumed(small_run(small_data, tmp_path / "four", *SHORT, *layout), 4, folder), one)


def test_documents_of_packs(small_data: PreparedData, tmp_path: Path) -> None:
    folders = [
        write_folder(tmp_path / name, small_data.tokenizer_dir, align=4, seed=seed)
        for seed, name in enumerate(("web", "code"))
    ]
    blend = ",".join(f"[1,{folder}]" for folder in folders)
    words = (f"data.train=[{blend}]", "data.path=nowhere", *SHORT)
    one, folder = sums(small_run(small_data, tmp_path / "one", *words, *FIRST))
    assert one.corpora == ("web", "code")
    assert set(one.corpus.tolist()) == {0, 1}
    assert_is_logged(one, folder)
    layout = ("layout.cp=2", "layout.pp=2")
    assert_equal(resumed(small_run(small_data, tmp_path / "four", *words, *layout), 4, folder), one)
