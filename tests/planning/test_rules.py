"""Rules: each fails for its own bad combination, names the values, and holds after its fix."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mellum2_megatron.checkpoint import StartingPoint
from mellum2_megatron.checkpoint.folder import RUN_FILE, TRACKER_FILE
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Device, Run, apply_overrides, to_yaml
from mellum2_megatron.data.feed import sources
from mellum2_megatron.data.prepared_folder import PreparedData
from mellum2_megatron.planning import machine_rules
from mellum2_megatron.planning.execution_rules import environment_is_deterministic
from mellum2_megatron.planning.gpus import find_gpu
from mellum2_megatron.planning.machine_rules import NODE_RULES, eval_tasks_fit, sample_prompts_fit
from mellum2_megatron.planning.rules import (
    RULES,
    PlannedRun,
    Rule,
    check,
    enforce,
)
from mellum2_megatron.recipes import recipe
from tests import parameter_id
from tests.planning.rule_cases import BIG, CASES, TINY

ELSEWHERE = {
    "memory-fits-the-card",  # it needs a card: test_memory_fit.py
    *("rl-has-rollouts", "rl-batch-is-the-objectives"),  # test_rl_rules.py
    *("rl-answers-fit", "rl-has-no-other-data"),
}


@pytest.mark.parametrize(("name", "device", "ranks", "bad", "rule", "named", "fix"), CASES)
def test_a_broken_rule_is_reported_and_its_fix_works(
    name: str, device: Device, ranks: int, bad: list[str], rule: str, named: str, fix: list[str]
) -> None:
    run = apply_overrides(recipe(name), bad)
    violations = check(run, ranks, device, machine=False)
    assert [violation.rule.name for violation in violations] == [rule] * len(violations)
    assert named in " ".join(violation.problem.value for violation in violations)
    assert all(violation.problem.fix and violation.rule.evidence for violation in violations)
    with pytest.raises(InputError, match=named.split("=")[0].split(" ")[0]):
        enforce(run, ranks, device, machine=False)
    if rule == "layout-fits" and ranks == 3:
        fix = [*fix, "schedule.batch_schedule=[[0,12]]", "schedule.train_samples=4644"]
    assert check(apply_overrides(run, fix), ranks, device, machine=False) == []


def test_every_rule_has_a_case_here() -> None:
    machine = {rule.name for rule in RULES if rule.machine}
    assert {case[4] for case in CASES} == {rule.name for rule in RULES} - machine - ELSEWHERE
    assert machine == {
        *(
            "packages-present",
            "data-present",
            "sample-prompts-fit",
            "eval-tasks-fit",
            "resume-fits",
        ),
        *("resume-keeps-settings", "resume-keeps-rate-down", "resume-keeps-tokenizer"),
        *("resume-ends-on-a-step", "stream-can-be-served", "environment-is-deterministic"),
        *("rl-server-can-start", "deterministic-documents-have-a-kernel"),
        "deterministic-attention-before-hopper",
    }
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.statement.endswith(".")
        assert rule.evidence


def test_every_branch_of_a_rule_has_a_case() -> None:
    """Each ``yield`` in a rule that needs no machine is reached by one of the cases."""
    branches = {
        (rule.name, node.lineno)
        for rule in RULES
        if not rule.machine and rule.name not in ELSEWHERE
        for node in ast.walk(ast.parse(source_in_place(rule)))
        if isinstance(node, ast.Yield)
    }
    reached = set()
    for name, device, ranks, bad, _, _, _ in CASES:
        run = apply_overrides(recipe(name), bad)
        start = StartingPoint(kind="new")
        planned = PlannedRun(run=run, world_size=ranks, device=device, start=start)
        for rule in RULES:
            if not rule.machine:
                problems = rule.find(planned)
                reached |= {(rule.name, problems.gi_frame.f_lineno) for _ in problems}
    assert branches - reached == set()
    assert len(branches) > 10


def source_in_place(rule: Rule) -> str:
    """Return the source of a rule, on the lines that it has in its file."""
    lines, first = inspect.getsourcelines(rule.find)
    return "\n" * (first - 1) + "".join(lines)


def test_enforce_reports_all_at_once() -> None:
    run = apply_overrides(
        recipe(BIG), ["layout.ep=6", "precision.fp8_param_gather=true", "data.sequence_length=9000"]
    )
    with pytest.raises(InputError) as error:
        enforce(run, 256, "cuda", machine=False)
    for key in ("layout.ep=6", "precision.fp8_param_gather=true", "data.sequence_length=9000"):
        assert key in str(error.value)
    assert "breaks 4 rules" in error.value.rule  # ep divides neither the experts nor the ranks
    enforce(recipe(BIG), 256, "cuda", machine=False)


def test_parameter_gather_is_forbidden_only_with_muon() -> None:
    adam = apply_overrides(recipe(BIG), ["precision.fp8_param_gather=true", "optimizer.name=adam"])
    assert check(adam, 256, "cuda", machine=False) == []


def broken_on_this_machine(run: Run, device: Device = "cpu") -> list[tuple[str, str]]:
    return [(violation.rule.name, violation.problem.value) for violation in check(run, 2, device)]


def with_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the run; its data count as present."""
    no_data = SimpleNamespace(train=(), valid=())
    monkeypatch.setattr(sources, "check_data", lambda run: no_data)
    monkeypatch.setattr(sources, "check_amounts", lambda run, data: [])
    return run


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    run = apply_overrides(recipe(TINY), [f"data.path={tmp_path / 'none'}"])
    assert broken_on_this_machine(run) == [("data-present", f"data.path={tmp_path / 'none'}")]
    assert check(run, 2, "cpu", machine=False) == []


def test_a_stream_needs_redis_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "stream-can-be-served"
    run = with_data(apply_overrides(recipe(TINY), ["data.feed=redis"]), monkeypatch)
    monkeypatch.setattr(machine_rules.shutil, "which", lambda program: None)
    lacking = (name, "data.feed=redis without data.stream.url")
    assert broken_on_this_machine(run) == [lacking]
    # The ranks of a launcher that serves them, and of a run that names its server.
    named = apply_overrides(run, ["data.stream.url=redis://h:1"])
    assert broken_on_this_machine(named) == []
    monkeypatch.setenv("MELLUM2_STREAM_URL", "redis://127.0.0.1:1")
    assert broken_on_this_machine(run) == []
    monkeypatch.delenv("MELLUM2_STREAM_URL")
    monkeypatch.setattr(machine_rules.shutil, "which", lambda program: program)
    assert broken_on_this_machine(run) == []
    large = apply_overrides(run, ["data.stream.window=2000000000"])
    assert broken_on_this_machine(large) == [(name, "data.stream.window=2000000000")]
    monkeypatch.setattr(machine_rules.importlib.util, "find_spec", lambda name: None)
    assert broken_on_this_machine(run) == [(name, "data.feed=redis")]


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_data(apply_overrides(recipe(TINY), ["logging.wandb_project=p"]), monkeypatch)
    monkeypatch.setattr(machine_rules.importlib.util, "find_spec", lambda name: None)
    assert broken_on_this_machine(run) == [("packages-present", "logging.wandb_project=p")]
    assert ("packages-present", "backend=auto, te on a GPU") in broken_on_this_machine(run, "cuda")
    monkeypatch.setattr(machine_rules.importlib.util, "find_spec", lambda name: object())
    assert broken_on_this_machine(run) == []


@pytest.mark.parametrize("backend", ["hybridep", "deepep"])
def test_a_missing_dispatcher_is_reported(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_data(recipe(TINY), monkeypatch)
    flex = ["layout.dispatcher=flex", f"layout.dispatcher_backend={backend}"]
    given = f"layout.dispatcher=flex, layout.dispatcher_backend={backend}"
    assert ("packages-present", given) in broken_on_this_machine(apply_overrides(run, flex), "cuda")


@pytest.mark.parametrize(
    "word",
    [
        *("--lr", "--micro-batch", "--no-bf16", "--fp8-recipe=delayed", "--swiglu", "--spec"),
        *("--moe-hybridep-num-sms", "--yaml-cfg", "--skip-train", "--add-qkv-bias", "-h"),
    ],
)
def test_a_word_that_a_key_covers_is_refused(word: str) -> None:
    """The flag itself, its beginning, its opposite, with a value, the model's, and others: another
    name of a key, a file in place of all keys, no training, another model, and the help."""
    run = apply_overrides(recipe(TINY), [f"execution.extra_arguments=[--log-params-norm,{word}]"])
    problems = [violation.problem.value for violation in check(run, 2, "cpu", machine=False)]
    assert problems == [f"execution.extra_arguments: {word}"]


@pytest.mark.parametrize(
    ("saved", "change", "named"),
    [
        (["optimizer.name=adam"], ["layout.ep=1"], "layout.ep=1"),
        (["optimizer.name=adam"], ["layout.ep=4"], None),
        (["optimizer.name=adam", "layout.ep=1"], ["layout.etp=2"], "layout.etp=2"),
        (["optimizer.name=adam", "layout.ep=1", "layout.etp=2"], ["layout.etp=1"], "layout.etp=1"),
        (
            ["optimizer.name=adam", "layout.ep=1", "layout.etp=2"],
            ["layout.etp=1", "layout.ep=2"],
            None,
        ),
        (
            ["optimizer.name=adam", "layout.ep=1", "layout.etp=2"],
            ["layout.tp=2", "layout.sp=true"],
            "layout.tp=2",
        ),
        ([], ["optimizer.name=adam"], "optimizer.name=adam"),
        ([], ["layout.ep=4"], None),
        ([], ["layout.ep=1"], None),
        (["layout.ep=1"], ["layout.etp=2"], None),
    ],
    ids=parameter_id,
)
def test_optimizer_state_must_be_readable_on_resume(
    saved: list[str],
    change: list[str],
    named: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = apply_overrides(recipe(TINY), ["schedule.micro_batch_size=2", *saved])
    before = with_data(
        dataclasses.replace(
            before, checkpoint=dataclasses.replace(before.checkpoint, output=str(tmp_path))
        ),
        monkeypatch,
    )
    (tmp_path / RUN_FILE).write_text(to_yaml(before))
    after = apply_overrides(before, change)
    assert check(after, 4, "cpu") == [], "nothing is there to resume yet"
    (tmp_path / TRACKER_FILE).write_text("100")
    assert check(before, 4, "cpu") == []
    found = [violation.problem.value for violation in check(after, 4, "cpu")]
    assert found == [] if named is None else (len(found) == 1 and named in found[0])


def test_prompts_fit_the_tokenizer_and_the_sequence(
    small_data: PreparedData, tmp_path: Path
) -> None:
    base = [f"data.path={small_data.path}", "data.sequence_length=16", "logging.sample_tokens=10"]

    def problems(prompts: str, *more: str) -> list[str]:
        run = apply_overrides(recipe(TINY), [*base, f"logging.sample_prompts={prompts}", *more])
        planned = PlannedRun(run=run, world_size=2, device="cpu", start=StartingPoint.of(run))
        return [f"{problem.value}: {problem.rule}" for problem in sample_prompts_fit.find(planned)]

    assert problems('["x = ", "ab cd"]') == []
    (long,) = problems('["x", "0123456"]')  # digits are single tokens
    assert long.startswith("logging.sample_prompts: '0123456'")
    assert "1 to 6 tokens" in long
    assert "it has 7" in long
    # Ranks would look for the token that ends a continuation, many steps later.
    shutil.copy(small_data.tokenizer_dir / "tokenizer.json", tmp_path)
    (endless,) = problems('["x"]', f"data.tokenizer={tmp_path}")
    assert "eos_token" in endless


def test_tasks_fit_the_tokenizer(small_data: PreparedData, tmp_path: Path) -> None:
    def problems(*overrides: str) -> list[str]:
        words = [f"data.path={small_data.path}", "logging.eval_tasks=[fim,completion]", *overrides]
        run = apply_overrides(recipe(TINY), words)
        planned = PlannedRun(run=run, world_size=2, device="cpu", start=StartingPoint.of(run))
        return [f"{problem.value}: {problem.rule}" for problem in eval_tasks_fit.find(planned)]

    assert problems() == []
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (small_data.tokenizer_dir / file).read_text()
        (tmp_path / file).write_text(text.replace("fim_", "other_"))
    (lacking,) = problems(f"data.tokenizer={tmp_path}")
    assert "fim with the tokenizer" in lacking
    assert problems(f"data.tokenizer={tmp_path}", "logging.eval_tasks=[completion]") == []


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Data that rules read: documents."""
    data = SimpleNamespace(document_attention=True)
    monkeypatch.setattr(sources, "check_data", lambda run: data)
    return data


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Packages that rules find: none yet. They look for drivers in `tmp_path`."""
    found: set[str] = set()
    monkeypatch.setattr(machine_rules, "_is_installed", lambda name: name in found)
    monkeypatch.setattr(machine_rules, "DRIVER_FOLDER", tmp_path)
    return found


def test_kernels_of_deterministic_documents(
    installed: set[str], documents: SimpleNamespace, tmp_path: Path
) -> None:
    """On Hopper cuDNN has none for the 12B's packs: FlashAttention 2, or 3 beside cp."""

    def problems(*overrides: str, **changes: object) -> list[str]:
        run = apply_overrides(recipe(BIG), ["execution.deterministic=true", *overrides])
        new = StartingPoint(kind="new")
        planned = PlannedRun(run=run, world_size=256, device="cuda", start=new)
        find = machine_rules.deterministic_documents_have_a_kernel.find
        return list(map(str, find(dataclasses.replace(planned, **changes))))

    (refused,) = problems()
    assert "documents in sequences of 8,192 tokens" in refused
    assert "4,294,967,296 scores" in refused
    assert "flash-attn or flash-attn-3 is not installed here" in refused
    assert problems("execution.deterministic=false") == []
    assert problems("backend=torch") == []
    assert problems("schedule.micro_batch_size=1", "data.sequence_length=4096") == []
    assert problems(gpu=find_gpu("h200")) == [refused]
    assert problems(gpu=find_gpu("b200")) == []
    installed.add("flash-attn")
    assert problems() == []
    (refused,) = problems("layout.cp=2")
    assert "and flash-attn-3 is not installed here" in refused
    documents.document_attention = False
    assert problems("layout.cp=2") == []
    documents.document_attention = True
    for number, model in enumerate(("NVIDIA B200", "NVIDIA H100 80GB HBM3")):
        card = tmp_path / str(number) / "information"
        card.parent.mkdir()
        card.write_text(f"Model: {model}")
        assert len(problems("layout.cp=2")) == number


def test_a_node_is_checked_for_packages_alone() -> None:
    """Without its data, its checkpoint and a known number of ranks: none of them is the node's."""
    run = apply_overrides(recipe(BIG), ["layout.dispatcher=flex", "backend=torch"])
    with pytest.raises(InputError, match="deep_ep is not installed here"):
        machine_rules.check_node(run, world_size=3, device="cuda")
    machine_rules.check_node(run, world_size=3, device="cpu")


def test_kernels_of_deterministic_runs_before_hopper(
    installed: set[str], documents: SimpleNamespace, tmp_path: Path
) -> None:
    """FlashAttention 2 or nothing; and nothing for documents beside cp."""
    information = tmp_path / "0" / "information"
    information.parent.mkdir()

    def problems(*overrides: str, card: str | None = "a100-80") -> list[str]:
        """Return the problems of both rules about deterministic attention."""
        run = apply_overrides(recipe(BIG), ["execution.deterministic=true", *overrides])
        planned = PlannedRun(
            run=run,
            world_size=256,
            device="cuda",
            start=StartingPoint(kind="new"),
            gpu=find_gpu(card) if card else None,
        )
        return [str(problem) for rule in NODE_RULES[1:] for problem in rule.find(planned)]

    (refused,) = problems()
    assert "on a card before Hopper" in refused
    assert "and flash-attn is not installed here" in refused
    assert problems(card="l40s") == [refused]
    assert problems("schedule.micro_batch_size=1", "data.sequence_length=4096") == [refused]
    assert problems("execution.deterministic=false") == problems("backend=torch") == []
    assert ["on Hopper" in problem for problem in problems(card="h100")] == [True]
    for model, before in (
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA A10G", True),
        ("NVIDIA L4", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H100 80GB HBM3", False),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA GB200", False),
    ):
        information.write_text(f"Model: {model}\n")
        found = problems("schedule.micro_batch_size=1", "data.sequence_length=4096", card=None)
        assert bool(found) == before, model
    installed.add("flash-attn")
    assert problems() == []
    (refused,) = problems("layout.cp=2")
    assert "with documents and layout.cp=2" in refused
    documents.document_attention = False
    assert problems("layout.cp=2") == []


def test_environment_of_a_deterministic_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = apply_overrides(recipe(BIG), ["execution.deterministic=true"])
    new = StartingPoint(kind="new")
    planned = PlannedRun(run=run, world_size=256, device="cuda", start=new)
    find = environment_is_deterministic.find
    assert list(find(planned)) == []
    monkeypatch.setenv("NCCL_ALGO", "Ring, CollnetChain")
    assert list(find(planned)) == []
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    (problem,) = find(planned)
    assert str(problem).startswith("NCCL_ALGO=Tree with execution.deterministic=true")
    assert list(find(dataclasses.replace(planned, run=recipe(BIG)))) == []
    monkeypatch.setenv("NCCL_ALGO", "")
    assert len(list(find(planned))) == 1
    monkeypatch.delenv("NCCL_ALGO")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1" in str(*find(planned))
