"""Suites of lm-evaluation-harness on a Hugging Face folder: data sets, runs, results.

The harness runs the model by transformers and scores it. This module knows which data sets a suite
needs, keeps the result of every finished task, so that a suite that was killed resumes, and lets no
program of a model run outside the sandbox.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import InputError, WorkError, first_line, nearest
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import JsonError, load_json
from mellum2_megatron.common.provenance import software
from mellum2_megatron.evaluation.harness_suites import HARNESS_SUITES, HarnessSuite, HarnessTask
from mellum2_megatron.rlvr.rewards.sandbox import find_sandbox

FORMAT = 1
"""Version of the JSON file."""

OWN_TASKS = Path(__file__).parent / "harness_tasks"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_NORMAL = 1.96
_MANY = 3
"""Subsets of one data set that a command still names one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set of a task.

    Attributes:
        path: its name on the hub, or a format such as ``json`` with local files.
        subset: its configuration; None for the only one.
    """

    path: str
    subset: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessRun:
    """How a suite is run.

    Attributes:
        limit: first items of each task; None (default): all.
        seed: seed of examples and of sampled answers, default 1.
        tasks: folder of the user's own task files; None (default): none.
        batch: requests at once, default 1.
    """

    limit: int | None = None
    seed: int = 1
    tasks: Path | None = None
    batch: int = 1


def find_suite(name: str, run: HarnessRun) -> HarnessSuite:
    """Return a suite by its name, or one of the user's own task.

    Raises:
        InputError: the harness is not installed, or there is no such suite or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"--suite {name}",
            rule="lm-evaluation-harness is not installed",
            fix="pip install 'mellum2-megatron[eval]'",
        )
    if name in HARNESS_SUITES:
        return HARNESS_SUITES[name]
    known = [key for key, entry in _index(run, defaults=False).task_index.items() if entry.cfg]
    if name not in known:
        raise InputError(
            f"--suite {name} --tasks {run.tasks}",
            rule="the folder has no such task",
            fix=nearest(name, known),
        )
    task = HarnessTask(
        name=name, benchmark=name, area="own", evidence="the user's own task", metric=""
    )
    return HarnessSuite(tasks=(task,))


def check_suite(name: str, suite: HarnessSuite, run: HarnessRun) -> None:
    """Refuse what cannot run here.

    Raises:
        InputError: data sets are missing, the message has the command that fetches them; a task
            would execute programs outside the sandbox; or there is no sandbox for one that does.
    """
    manager = _manager(suite, run)
    needed: dict[DataSet, None] = {}
    for task in suite.tasks:
        for cfg in _configs(manager, task.name):
            if cfg.get("unsafe_code"):
                raise InputError(
                    f"--suite {name}: {cfg['task']}",
                    rule="it executes programs of a model in this process",
                    fix="use the tasks in mellum2_megatron/evaluation/harness_tasks",
                )
            if not (cfg.get("dataset_kwargs") or {}).get("data_files"):
                needed[DataSet(path=cfg["dataset_path"], subset=cfg.get("dataset_name"))] = None
    folder = _cache()
    missing = [one for one in needed if not is_cached(one, folder)]
    if missing:
        names = ", ".join(dict.fromkeys(one.path for one in missing))
        raise InputError(
            f"--suite {name}",
            rule=f"the cache of data sets, {folder}, lacks {names}",
            fix=f"where there is a network run `{fetch_command(missing)}`, and copy its cache here",
        )
    if any(task.name.startswith("mellum2_") for task in suite.tasks):
        find_sandbox()


def is_cached(data: DataSet, cache: Path) -> bool:
    """Return true if the cache of `datasets` has a data set: ``OWNER___NAME/SUBSET/../*.arrow``."""
    folder = cache / data.path.replace("/", "___")
    if data.subset is not None:
        folder /= data.subset
    return any(folder.glob("**/*.arrow"))


def fetch_command(missing: Sequence[DataSet]) -> str:
    """Return a command that puts data sets into the cache of the machine it runs on."""
    subsets: dict[str, list[str | None]] = {}
    for one in missing:
        subsets.setdefault(one.path, []).append(one.subset)
    loads = []
    for path, names in subsets.items():
        if len(names) > _MANY:
            loads.append(
                f"[d.load_dataset({path!r}, s) for s in d.get_dataset_config_names({path!r})]"
            )
        else:
            loads += [f"d.load_dataset({path!r}, {name!r})" for name in names]
    return f'python -c "import datasets as d; {"; ".join(loads)}"'


def run_suite(
    folder: Path,
    suite: HarnessSuite,
    run: HarnessRun,
    *,
    model: Path,
    name: str,
    out: Path,
    announce: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Run a suite and write its result; finished tasks of an interrupted run are kept.

    Args:
        folder: Hugging Face folder.
        suite: from `find_suite`, checked by `check_suite`.
        run: how.
        model: the model as the user named it; its files tell whether kept results are its own.
        name: the suite's name.
        out: JSON file. Until it is written, ``OUT.parts/`` has a file for each finished task.
        announce: called with a line before each task; default: nothing is said.

    Returns:
        What the file has: ``model``, ``suite``, ``tasks`` with their figures, ``missing``, and
        versions.

    Raises:
        WorkError: the harness failed in a task.
    """
    parts = out.with_name(out.name + ".parts")
    key = _key(model, suite, run)
    loaded: Any = None
    results = []
    for task in suite.tasks:
        part = parts / f"{task.name}.json"
        result = _kept(part, key)
        if result is not None:
            announce(f"{task.benchmark}: kept from an interrupted run")
        else:
            announce(f"measuring {task.benchmark} ({task.name})")
            loaded = loaded or _load(folder, suite, run)
            result = _run_task(loaded, task, suite, run)
            write_json(part, {"key": key, "result": result})
        results.append(result)
    report = {
        "format": FORMAT,
        "model": str(model),
        "suite": name,
        **software(),
        "harness": key["versions"],
        "settings": {
            "limit": run.limit,
            "seed": run.seed,
            "chat": suite.chat,
            "sampling": dict(suite.sampling),
        },
        "tasks": results,
        "missing": dict(suite.missing),
    }
    write_json(out, report)
    shutil.rmtree(parts, ignore_errors=True)
    return report


def _run_task(
    loaded: Any, task: HarnessTask, suite: HarnessSuite, run: HarnessRun
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        result = simple_evaluate(
            model=loaded,
            tasks=[task.name],
            limit=run.limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=suite.chat,
            gen_kwargs=dict(suite.sampling) or None,
            task_manager=_manager(suite, run),
            random_seed=run.seed,
            numpy_random_seed=run.seed,
            torch_random_seed=run.seed,
            fewshot_random_seed=run.seed,
        )
    except Exception as error:
        raise WorkError(
            f"the harness failed in {task.name} ({first_line(error)})",
            fix="see its message above; finished tasks are kept, run the command again",
        ) from error
    figures = {
        metric: value
        for metric, value in result["results"][task.name].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in metric
    }
    metric = task.metric if task.metric in figures else next(iter(figures))
    named, _, chain = metric.partition(",")
    spread = figures.get(f"{named}_stderr,{chain}")
    value = float(figures[metric])
    shots = [result["n-shot"].get(each) for each in result.get("n-samples", {})]
    counts = [entry["effective"] for entry in result.get("n-samples", {}).values()]
    return {
        **asdict(task),
        "metric": metric,
        "value": value,
        "low": None if spread is None else value - _NORMAL * spread,
        "high": None if spread is None else value + _NORMAL * spread,
        "items": sum(counts),
        "shots": shots[0] if len(set(shots)) == 1 else None,
        "shots_source": "the harness' own; the report's are unknown",
        "version": result["versions"].get(task.name),
        "figures": figures,
    }


def _load(folder: Path, suite: HarnessSuite, run: HarnessRun) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    gpu = torch.cuda.is_available()
    more = {} if suite.think_end is None else {"think_end_token": suite.think_end}
    return HFLM(
        pretrained=str(folder),
        dtype="auto" if gpu else "float32",
        device="cuda" if gpu else "cpu",
        batch_size=run.batch,
        **more,
    )


def _manager(suite: HarnessSuite, run: HarnessRun) -> Any:
    """Return the harness' index of tasks, its own thousands only if the suite needs them."""
    small = _index(run, defaults=False)
    if all(task.name in small.task_index for task in suite.tasks):
        return small
    return _index(run, defaults=True)


@cache
def _index(run: HarnessRun, *, defaults: bool) -> Any:
    os.environ.update(_OFFLINE)  # before `datasets` is imported, which reads them once
    from lm_eval.tasks import TaskManager

    paths = [str(path) for path in (OWN_TASKS, run.tasks) if path is not None]
    return TaskManager(include_path=paths, include_defaults=defaults)


def _configs(manager: Any, name: str) -> list[Mapping[str, Any]]:
    """Return the configurations of a task, or of all tasks of a group."""
    entry = manager.task_index[name]
    if entry.cfg is None:  # a tag
        members: Sequence[Any] = sorted(entry.tags)
    elif isinstance(entry.cfg["task"], str):
        return [entry.cfg]
    else:
        members = entry.cfg["task"]
    names = [one["task"] if isinstance(one, dict) else one for one in members]
    return [found for each in names for found in _configs(manager, each)]


def _cache() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def _key(model: Path, suite: HarnessSuite, run: HarnessRun) -> dict[str, Any]:
    """Return what a kept result must have been made with."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        # Not our own results, which are written meanwhile.
        if not file.name.startswith("eval_") and ".parts" not in str(file):
            status = file.stat()
            digest.update(
                f"{file.relative_to(model)} {status.st_size} {status.st_mtime_ns}".encode()
            )
    versions = {
        name: importlib.metadata.version(name) for name in ("lm_eval", "datasets", "transformers")
    }
    return {
        "model": digest.hexdigest(),
        "versions": versions,
        "limit": run.limit,
        "seed": run.seed,
        "chat": suite.chat,
        "sampling": dict(suite.sampling),
    }


def _kept(part: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = load_json(part)
    except (OSError, JsonError):
        return None
    result = found.get("result")
    return result if found.get("key") == key and isinstance(result, dict) else None
