"""Training on packs: every document counts as if it were alone, in every layout."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch

from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.data.chat.packs import prepare_chat
from mellum2_megatron.data.feed.sample_places import places
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.recipes import recipe
from tests.data.chats import random_rows, write_rows, write_tokenizer
from tests.data.packs import random_documents, write_folder, write_pieces
from tests.distributed import run_distributed
from tests.layouts.attention_worker import Problem, held
from tests.small import SMALL_MODEL
from tests.training.packs_worker import LENGTH, SEQUENCES, dataset
from tests.training.test_train import losses, small_run, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("packs") / "shard"
    documents = random_documents(1, count=40, longest=40, vocabulary=96)
    write_pieces(prefix, documents, length=LENGTH, vocabulary=96, align=4)
    write_pieces(
        prefix.with_name("masked"),
        documents,
        length=LENGTH,
        vocabulary=96,
        align=4,
        counts=masks(documents),
    )
    return prefix


def masks(documents: list[list[int]]) -> list[list[bool]]:
    """Return the learnt tokens of documents, as of conversations: some parts of each."""
    rng = random.Random(5)
    return [[rng.random() < 0.4 for _ in document] for document in documents]


@pytest.fixture(scope="module")
def alone(prefix: Path) -> list[torch.Tensor]:
    (found,) = run_distributed("tests.training.packs_worker:losses_alone", 1, str(prefix))
    assert len(found) > 6
    return list(found)


@pytest.mark.parametrize(
    ("tp", "cp", "masked"),
    [(1, 1, False), (1, 2, False), (2, 1, False), (1, 1, True), (1, 2, True)],
    ids=["one", "cp2", "tp2", "masked", "masked-cp2"],
)
def test_documents_in_packs_are_as_they_are_alone(
    tp: int, cp: int, masked: bool, prefix: Path, alone: list[torch.Tensor]
) -> None:
    """The loss of each token, and which of them count: of a conversation those that are learnt."""
    learnt = masks(random_documents(1, count=40, longest=40, vocabulary=96))
    prefix = prefix.with_name("masked") if masked else prefix
    ranks = run_distributed(
        "tests.training.packs_worker:packed_losses", tp * cp, str(prefix), tp=tp, cp=cp
    )
    packs = dataset(str(prefix))
    starts, lengths, numbers = [], [], []
    for index in range(SEQUENCES):
        pieces = packs.shard(0).pieces(packs.place(index).pack)
        starts += (pieces.starts + index * LENGTH).tolist()
        lengths += pieces.lengths.tolist()
        numbers += (pieces.documents.astype(int) - 1000).tolist()
    rooms = [end - start for start, end in itertools.pairwise([*starts, SEQUENCES * LENGTH])]
    loss, mask = torch.full((2, SEQUENCES * LENGTH), float("nan"))
    problem = Problem(window=None, rooms=tuple(rooms), lengths=tuple(lengths))
    for rank in range(cp):
        places = held(problem, cp, rank) if cp > 1 else list(range(SEQUENCES * LENGTH))
        loss[places], mask[places] = ranks[rank * tp]
    counted = torch.zeros_like(mask)
    for start, length, number, expected in zip(starts, lengths, numbers, alone, strict=True):
        assert length == len(learnt[number])
        counted[start : start + length - 1] = torch.tensor(learnt[number][1:]) if masked else 1
        # Labels that do not count are not those of the text.
        counts = counted[start : start + length - 1].bool()
        actual = loss[start : start + length - 1][counts]
        torch.testing.assert_close(actual, expected[counts], rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, counted)


@pytest.fixture(scope="module")
def pack_folders(
    small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return tuple(
        write_folder(root / name, small_data.tokenizer_dir, align=4, seed=seed)
        for seed, name in enumerate(("web", "code"))
    )


def run_on_packs(data: PreparedData, folders: tuple[Path, Path], output: Path, *words: str) -> Run:
    blend = ",".join(f"[{weight},{folder}]" for weight, folder in zip((3, 1), folders, strict=True))
    return small_run(
        data,
        output,
        f"data.train=[{blend}]",
        "data.path=nowhere",
        "layout.ep=1",
        "schedule.train_samples=24",
        "schedule.batch_schedule=[[0,4]]",
        "schedule.decay_samples=4",
        *words,
    )


def test_training_on_packs_resumes_in_the_same_and_another_layout(
    small_data: PreparedData, pack_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Six steps; three and then three more, also over two stages with one sequence at a time."""
    straight = train(run_on_packs(small_data, pack_folders, tmp_path / "straight"), 1)
    for name in ("web", "code"):
        assert losses(straight, f"lm_loss/{name}", "valid").keys() == {3, 6}
    half = ["schedule.train_samples=12", "schedule.horizon_samples=24"]
    train(run_on_packs(small_data, pack_folders, tmp_path / "resumed", *half), 1)
    shutil.copytree(tmp_path / "resumed", tmp_path / "piped")
    resumed = train(run_on_packs(small_data, pack_folders, tmp_path / "resumed"), 1)
    assert losses(resumed) == losses(straight)
    assert losses(resumed, kind="valid") == losses(straight, kind="valid")
    stages = ["layout.pp=2", "schedule.micro_batch_size=1"]
    piped = train(run_on_packs(small_data, pack_folders, tmp_path / "piped", *stages), 2)
    # The loss before the first update: weights and samples are the same.
    assert losses(piped)[4] == pytest.approx(losses(straight)[4], rel=1e-4)
    assert sorted(losses(piped)) == [1, 2, 3, 4, 5, 6]


def test_fine_tuning_resumes_inside_an_epoch(tmp_path: Path) -> None:
    """Two ranks share each conversation; an epoch has every sample once, also over a resume."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = write_rows(tmp_path / "chats.jsonl", random_rows(3, 24, longest=8))
    packs = prepare_chat(
        tmp_path / "packs",
        [rows],
        tokenizer=tokenizer,
        mode="thinking",
        length=256,
        align=4,
        workers=1,
        valid_fraction=0.1,
        progress=False,
    )
    epoch = packs.folder.packs("train")
    assert epoch > 6

    def run(name: str, *words: str) -> Run:
        common = [
            *SMALL_MODEL,
            f"data.path={packs.folder.path}",
            "data.sequence_length=256",
            "schedule.batch_schedule=[[0,2]]",
            "schedule.micro_batch_size=1",
            "schedule.warmup_samples=2",
            "layout.ep=1",
            "logging.eval_interval=2",
            "logging.eval_iterations=1",
            "checkpoint.save_interval=2",
            "checkpoint.load=null",
            f"checkpoint.output={tmp_path / name}",
            "schedule.train_samples=8",
        ]
        return apply_overrides(recipe("mellum2_tiny_sft_thinking"), [*common, *words])

    straight = train(run("straight"), 2)
    half = ["schedule.train_samples=4", "schedule.horizon_samples=8"]
    train(run("resumed", *half), 2)
    resumed = train(run("resumed"), 2)
    assert losses(resumed) == losses(straight)
    assert losses(resumed, kind="valid") == losses(straight, kind="valid")
    # The samples that any process can name: an epoch holds each pack once.
    longer = run("straight", f"schedule.train_samples={2 * epoch}")
    seen = [place.pack for place in places(longer, range(epoch))]
    assert sorted(seen) == list(range(epoch))
