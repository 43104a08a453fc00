"""A study in a file, small enough to train in seconds, for the tests of asking and running."""

from __future__ import annotations

from pathlib import Path

from mellum2_megatron.data.prepared_folder import PreparedData
from tests.small import SMALL_MODEL

SHORT = [
    *SMALL_MODEL,
    "layout.ep=1",
    "schedule.batch_schedule=[[0,4]]",
    "schedule.decay_samples=4",
    "schedule.train_samples=12",
    "logging.eval_iterations=1",
    "logging.tensorboard=false",
    "checkpoint.save_interval=1000",
]
"""Overrides of the tiny recipe: one process, three steps."""

TEXT = """
from ablations.asking import Arm, DataSet, Match, Metric, StopRule, Study

STUDY = Study(
    question="Does it run?",
    arms=({arms}),
    control="base",
    metrics=(Metric("{metric}", delta=0.02),),
    bases={{"tiny": "mellum2_tiny_pretrain"}},
    common={{"tiny": {common!r}}},
    data={{"tiny": DataSet(name="code", path={data!r}, command="mellum2 data prepare")}},
    {more}
)
"""
ARMS = 'Arm("base"), Arm("adam", "optimizer.name=adam")'


def write_study(
    file: Path,
    data: PreparedData | Path,
    *,
    arms: str = ARMS,
    more: str = "",
    metric: str = "valid_loss",
    common: tuple[str, ...] = (),
) -> Path:
    """Write a study and return its file.

    Args:
        file: file to write.
        data: its data.
        arms: its arms, as Python.
        more: further arguments, as Python; default none.
        metric: name of its metric, default the validation loss.
        common: overrides after those of `SHORT`, default none.
    """
    path = data if isinstance(data, Path) else data.path
    words = (*SHORT, *common)
    file.write_text(TEXT.format(arms=arms, common=words, data=str(path), more=more, metric=metric))
    return file
