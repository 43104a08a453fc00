"""Rules about reinforcement learning: a batch is one objective's, and answers are its only data."""

from __future__ import annotations

from pathlib import Path

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Rl
from mellum2_megatron.planning.rule import PlannedRun, Problems, rule
from mellum2_megatron.serving.command import check_versions, read_versions


@rule(evidence="training/datasets.py: a run has one feed")
def rl_has_rollouts(planned: PlannedRun) -> Problems:
    """Settings of reinforcement learning are given to a run that learns from answers."""
    run = planned.run
    if run.data.feed != "rollouts" and run.rl != Rl():
        yield InputError(
            f"rl.* with data.feed={run.data.feed}",
            rule="this run learns from data, and would ignore them",
            fix="set data.feed=rollouts, or leave rl.* out",
        )


@rule(evidence="rollouts/trainer.py: a step is one batch of the objective")
def rl_batch_is_the_objectives(planned: PlannedRun) -> Problems:
    """Each step learns from the objective's prompts times its answers to each."""
    run = planned.run
    if run.data.feed != "rollouts":
        return
    objective = run.rl.objective
    size = objective.prompts * objective.group_size
    if run.schedule.batch_schedule != ((0, size),):
        given = str(list(map(list, run.schedule.batch_schedule))).replace(" ", "")
        yield InputError(
            f"schedule.batch_schedule={given}",
            rule=f"a step learns from rl.objective.prompts * group_size = {size} answers",
            fix=f"set schedule.batch_schedule=[[0,{size}]] and schedule.train_samples to a "
            f"multiple of {size}",
        )


@rule(evidence="rollouts/trainer.py: an answer and its prompt are one sequence")
def rl_answers_fit(planned: PlannedRun) -> Problems:
    """The longest answer leaves room for a prompt in a sequence."""
    run = planned.run
    answer, length = run.rl.objective.max_tokens, run.data.sequence_length
    if run.data.feed == "rollouts" and answer >= length:
        yield InputError(
            f"rl.objective.max_tokens={answer} with data.sequence_length={length}",
            rule="a sequence holds the prompt and its answer",
            fix=f"use at most {length - 1}, or raise data.sequence_length",
        )


@rule(evidence="rollouts/trainer.py: samples exist once a step's answers are written")
def rl_has_no_other_data(planned: PlannedRun) -> Problems:
    """Answers are the only samples, made in the rank itself, and their loss is per token."""
    run = planned.run
    if run.data.feed != "rollouts":
        return
    data = run.data
    wanted = (
        ("loss.per_token", run.loss.per_token, True, "the objective is a mean over tokens"),
        (
            "loss.head_chunk",
            run.loss.head_chunk,
            None,
            "each token's loss has a gradient of its own, and chunks know only the loss mask",
        ),
        ("data.workers", data.workers, 0, "the samples are made in the rank itself"),
        ("data.first_sample", data.first_sample, 0, "there are no samples to skip"),
        ("data.train", data.train, (), "the tasks are in data.path"),
        ("data.valid", data.valid, (), "the tasks of a validation are in data.path"),
        ("data.phase", data.phase, None, "the tasks are in data.path"),
        (
            "stability.spike",
            run.stability.spike,
            "ignore",
            "the loss of a policy is around 0, so no multiple of it is a spike",
        ),
        (
            "logging.eval_iterations",
            run.logging.eval_iterations,
            0,
            "a validation asks the tasks, see rl.eval_answers",
        ),
    )
    for key, value, only, why in wanted:
        if value != only:
            shown = {True: "true", False: "false", (): "[]", None: "null"}
            yield InputError(
                f"{key}={shown.get(value, value)} with data.feed=rollouts",
                rule=why,
                fix=f"set {key}={shown.get(only, only)}",
            )
    if data.document_attention:
        yield InputError(
            "data.document_attention=true with data.feed=rollouts",
            rule="each answer is a sequence of its own",
            fix="set data.document_attention=null",
        )


@rule(evidence="serving/command.py", machine=True)
def rl_server_can_start(planned: PlannedRun) -> Problems:
    """The vLLM that the run is to start is installed, and can serve the model."""
    rl = planned.run.rl
    if rl.server_python is None:
        return
    try:
        versions = read_versions(Path(rl.server_python), given="rl.server_python")
        check_versions(versions, planned.run.architecture, use_mtp=False)
    except InputError as error:
        yield error
