"""`mellum2 rl render-nemo`: a run of reinforcement learning for NeMo-RL on a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mellum2_megatron.cli.options import Overrides, Overwrite, RecipeOrRun
from mellum2_megatron.cli.rl import HeldOut, rl_app
from mellum2_megatron.common.console import console, plain_table, print_line
from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.files import check_writable

if TYPE_CHECKING:
    from mellum2_megatron.config import Run
    from mellum2_megatron.rlvr.nemo_rl.config import Place
    from mellum2_megatron.rlvr.tasks import Task


Output = Annotated[
    Path | None, typer.Option("--output", help="folder to write; default: runs/RECIPE_nemo_rl")
]
Checkout = Annotated[Path, typer.Option("--checkout", help="folder of NeMo-RL, on the cluster")]
HfPath = Annotated[
    Path | None,
    typer.Option("--hf-path", help="Hugging Face folder of the model; default: LOAD/hf"),
]
Mode = Literal["sync", "async"]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="sync: drops groups of equal rewards; async: answers up to "
        "rl.objective.max_age updates old, and drops nothing",
    ),
]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="site profile with NeMo-RL's container")
]
RewardsProfile = Annotated[
    str | None,
    typer.Option("--rewards-profile", help="site profile of the rewards' job; default: --profile"),
]
GenerationNodes = Annotated[
    int | None,
    typer.Option(
        "--generation-nodes",
        min=1,
        help="nodes that write answers, with --mode async; default: as many as train",
    ),
]
Tasks = Annotated[
    list[Path] | None,
    typer.Option("--tasks", help="file of tasks (repeatable); default: data.path/train.jsonl"),
]
ValidTasks = Annotated[
    list[Path] | None,
    typer.Option(
        "--valid-tasks",
        help="file of validation tasks (repeatable); default: data.path/valid.jsonl if there",
    ),
]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="port of the rewards")]


@rl_app.command("render-nemo")
def render_nemo(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    output: Output = None,
    checkout: Checkout = Path("NeMo-RL"),
    hf_path: HfPath = None,
    mode: ModeOption = "sync",
    profile: ProfileOption = None,
    rewards_profile: RewardsProfile = None,
    generation_nodes: GenerationNodes = None,
    tasks: Tasks = None,
    valid_tasks: ValidTasks = None,
    held_out: HeldOut = None,
    port: Port = 8400,
    overwrite: Overwrite = False,
) -> None:
    """Write NeMo-RL's configuration of a run and a script that launches it.

    Every key is checked against those that NeMo-RL declares; what it cannot express is printed.
    Nothing is started.
    """
    from launchers.corpus_arrays import project_folder
    from launchers.nemo_rl import (
        CONFIG_FILE,
        LAUNCH_FILE,
        REWARDS_FILE,
        Launch,
        check_launch,
        launch_script,
        rewards_script,
    )
    from launchers.profile import Profile, read_profile
    from mellum2_megatron.planning.resolve import resolve_run
    from mellum2_megatron.rlvr.nemo_rl.config import (
        TEMPLATE_FILE,
        TRAIN_TASKS,
        VALID_TASKS,
        Place,
        render_config,
    )
    from mellum2_megatron.rlvr.nemo_rl.declared import declared
    from mellum2_megatron.rlvr.nemo_rl.limits import limits_page

    if generation_nodes is not None and mode == "sync":
        raise InputError(
            f"--generation-nodes {generation_nodes} with --mode sync",
            rule="nodes that train write the answers too",
            fix="add --mode async, or leave it out",
        )
    run = resolve_run(recipe, overrides or [])
    site = Profile(name="local", executor="local") if profile is None else read_profile(profile)
    rewards = site if rewards_profile is None else read_profile(rewards_profile)
    target = Path(os.path.abspath(output or Path("runs") / f"{run.name}_nemo_rl"))
    check_writable("--output", target, folder=True)
    model = _model_folder(run, hf_path)
    for name, path in (("--checkout", checkout), ("--hf-path", model)):
        if path.exists() and not path.is_dir():
            raise InputError(f"{name} {path}", rule="is a file", fix="name a folder")
    template = _template(run, model)
    train, valid = _task_files(run, tasks, valid_tasks)
    # No task is trained on that the validation asks.
    read = {TRAIN_TASKS: _tasks(train, held_out or (), valid)}
    if valid and run.rl.eval_answers:
        read[VALID_TASKS] = _tasks(valid, held_out or ())
    owners = [task for rows in read.values() for task in rows if _own(task)]
    _require_thoughts(model, [task for rows in read.values() for task in rows])
    gpus = site.gpus_per_node
    nodes = site.nodes or -(-(run.layout.world_size or gpus) // max(1, gpus))
    place = Place(
        output=target,
        checkout=Path(os.path.abspath(checkout)),
        hf_path=model,
        gpus_per_node=gpus,
        nodes=nodes,
        generation_nodes=(generation_nodes or nodes) if mode == "async" else 0,
        validates=VALID_TASKS in read,
        own_template=template is not None,
    )
    config = render_config(run, place, mode)
    launch = Launch(
        name=run.name,
        output=target,
        checkout=place.checkout,
        nodes=config["cluster"]["num_nodes"],
        profile=site,
        rewards=rewards,
        port=port,
        own=sorted({name for task in owners for name in _own(task)}),
        tasks=_own_folder(owners) or Path(os.path.abspath(train[0])).parent,
    )
    check_launch(launch, [target, place.checkout, model, project_folder()])
    files = {
        CONFIG_FILE: _yaml(run, config, declared(place.checkout).commit),
        LAUNCH_FILE: launch_script(launch),
        REWARDS_FILE: rewards_script(launch),
        "limits.md": limits_page(run, mode, place.checkout),
        **{file: "".join(f"{_line(task)}\n" for task in rows) for file, rows in read.items()},
        **({} if template is None else {TEMPLATE_FILE: template}),
    }
    _write(target, files, overwrite=overwrite)
    _print_limits(run, mode, place)
    print_line(f"wrote {target}; next: bash {target / LAUNCH_FILE}")


def _model_folder(run: Run, hf_path: Path | None) -> Path:
    """Return the Hugging Face folder that the run starts from, absolute.

    Raises:
        InputError: none is given, and the run does not start from a checkpoint.
    """
    # Another kind of run is refused later, with its reason.
    if run.data.feed == "rollouts" and not (hf_path or run.checkpoint.load):
        raise InputError(
            f"{run.name} without checkpoint.load and --hf-path",
            rule="NeMo-RL starts from a Hugging Face folder",
            fix="give its path with --hf-path",
        )
    return Path(os.path.abspath(hf_path or Path(run.checkpoint.load or "") / "hf"))


def _print_limits(run: Run, mode: Mode, place: Place) -> None:
    """Print what NeMo-RL does otherwise than the run, and what could not be checked here."""
    from mellum2_megatron.rlvr.nemo_rl.limits import keys_line, limits

    table = plain_table("setting", "NeMo-RL", "rendered")
    for one in limits(run, mode):
        table.add_row(one.setting, one.there, one.done)
    console.print(table)
    print_line(keys_line(place.checkout))
    model = place.hf_path
    if not (model / "tokenizer.json").is_file():
        print_line(f"not checked: {model} is not on this machine (chat template, `</think>`)")


def _task_files(
    run: Run, tasks: list[Path] | None, valid_tasks: list[Path] | None
) -> tuple[list[Path], list[Path]]:
    """Return the files of tasks to train on and to validate with: those given, else the run's."""
    from mellum2_megatron.data.feed.task_files import task_file

    if valid_tasks and not run.rl.eval_answers:
        raise InputError(
            "--valid-tasks with rl.eval_answers=0",
            rule="this run has no validation",
            fix="set rl.eval_answers=1, or leave --valid-tasks out",
        )
    train, valid = (task_file(run.data, split) for split in ("train", "valid"))
    return (
        tasks or [train or Path(run.data.path) / "train.jsonl"],
        valid_tasks or ([] if valid is None else [valid]),
    )


def _own_folder(tasks: Sequence[Task]) -> Path | None:
    """Return the folder that the functions of some tasks are named from; None without a task.

    Raises:
        InputError: there are two. The service of the rewards is started in one.
    """
    folders = {Path(os.path.abspath(task.folder)): task for task in tasks}
    if len(folders) > 1:
        one, other = list(folders.values())[:2]
        raise InputError(
            f"{one.place} and {other.place} name functions of their own",
            rule="the service of the rewards finds them from one folder, and these are two",
            fix="put the files of tasks and the functions into one folder",
        )
    return next(iter(folders), None)


def _tasks(
    files: Sequence[Path], held_out: Sequence[Path], validation: Sequence[Path] = ()
) -> list[Task]:
    from mellum2_megatron.rlvr.tasks import read_tasks

    checked = read_tasks(files, held_out=held_out, validation=validation)
    for warning in checked.warnings:
        print_line(f"warning: {warning}")
    return list(checked.tasks)


def _template(run: Run, model: Path) -> str | None:
    """Return a chat template to use in place of the tokenizer's own; None: that one."""
    from mellum2_megatron.data.chat.template import choose_template, read_template

    given = run.rl.chat_template
    has_own = not model.is_dir() or read_template(model) is not None
    return None if given is None and has_own else choose_template(model, given).text


def _require_thoughts(model: Path, tasks: Sequence[Task]) -> None:
    """Refuse thinking tasks with a tokenizer whose ``</think>`` NeMo-RL would drop from answers.

    Raises:
        InputError: see above.
    """
    file = model / "tokenizer.json"
    if not file.is_file() or not any(task.thinking for task in tasks):
        return
    from mellum2_megatron.common.json_files import load_json

    try:
        tokens = load_json(file).get("added_tokens") or ()
    except (OSError, ValueError) as error:
        raise InputError(
            str(file),
            rule=f"it must be a tokenizer ({first_line(error)})",
            fix="give --hf-path a folder with the model's own tokenizer.json",
        ) from error
    for token in tokens:
        known = isinstance(token, dict)
        if known and token.get("content") == "</think>" and token.get("special"):
            raise InputError(
                f"{file}: </think> is a special token",
                rule="NeMo-RL decodes answers without special tokens, so that all of a thinking "
                "answer would be read as thoughts or as none",
                fix='give --hf-path a copy with "special": false for <think> and </think>',
            )


def _own(task: Task) -> list[str]:
    """Return the functions of one's own that a task's verifier names."""
    parts = task.arguments.get("of", []) if task.verifier == "all" else []
    names = [task.verifier, *(str(part["verifier"]) for part in parts)]
    return [name for name in names if ":" in name]


def _line(task: Task) -> str:
    row = {
        "messages": [message.plain() for message in task.prompt.messages],
        "tools": task.row.get("tools", []),
        "verifier": task.verifier,
        "arguments": dict(task.arguments),
        "thinking": task.thinking,
    }
    return json.dumps(row, ensure_ascii=False)


def _yaml(run: Run, config: dict[str, Any], commit: str) -> str:
    import yaml

    head = (
        f"# {run.name} for NeMo-RL {commit}, by `mellum2 rl render-nemo`.\n"
        "# limits.md has what this version does otherwise. It was not run here.\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False, default_flow_style=False)


def _write(target: Path, files: dict[str, str], *, overwrite: bool) -> None:
    """Write the folder; in one that is there, replace these files and leave checkpoints alone.

    Raises:
        InputError: the folder is there, without ``overwrite``.
        WorkError: it cannot be written.
    """
    from mellum2_megatron.common.files import atomic_directory, write_text

    try:
        if not target.exists():
            with atomic_directory(target) as folder:
                for name, text in files.items():
                    write_text(folder / name, text)
            return
        if not overwrite:
            raise InputError(
                f"--output {target}",
                rule="it exists",
                fix="name another folder, or add --overwrite to replace what is rendered in it",
            )
        for name, text in files.items():
            write_text(target / name, text)
    except OSError as error:
        raise WorkError(
            f"writing {target} failed ({first_line(error)})",
            fix="free space on that disk, or name another --output",
        ) from error
