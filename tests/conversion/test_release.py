"""From a Megatron checkpoint to a published folder: complete, verified, all or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from conversion.convert import import_hf
from conversion.huggingface.folder import read_config
from conversion.release.check_release import check_release
from conversion.release.members import MEMBERS, check_member_of_run
from conversion.release.model_card import read_evaluation
from conversion.release.release import LOGITS, ReleaseResult, release
from mellum2_megatron.architecture import RopeParameters
from mellum2_megatron.checkpoint.folder import read_architecture, write_architecture
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.config import to_yaml
from mellum2_megatron.data.chat.template import our_template
from mellum2_megatron.recipes import recipe
from tests.conversion.folders import load_tensors
from tests.conversion.releases import TEMPLATE


def left_behind(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if target.name in path.name]


def test_a_release_is_complete_and_holds_the_models_weights(
    released: ReleaseResult, chat_model: Path
) -> None:
    folder = released.path
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
        "weights_manifest.json",
    ]
    assert left_behind(folder) == [folder.name]
    before, after = load_tensors(chat_model), load_tensors(folder)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert read_config(folder) == read_config(chat_model)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    # The template's turns end with <|im_end|>, id 8; the tokenizer's text with id 1.
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [8, 1]
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_every_check_of_a_release_ran_and_passed(released: ReleaseResult) -> None:
    assert released.report is not None
    outcomes = {check.name: check.status for check in released.report.checks}
    assert [name for name, status in outcomes.items() if status != "pass"] == []
    assert outcomes[LOGITS] == "pass"


@pytest.mark.parametrize("step", ["open", "write_text", "write_json", "move_into_place"])
def test_a_full_disk_at_any_step_is_one_error_and_leaves_the_former_release(
    step: str, chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock, licence and card, verification card, and the last step."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"member": "base", "skip_run": True, "overwrite": True}
    release(chat_checkpoint, out, **options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    whole = Path.open

    def no_lock(path: Path, *mode: Any, **options: Any) -> Any:
        return (full if path.name == ".lock" else whole)(path, *mode, **options)

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(Path, "open", no_lock)
        else:
            patch.setattr(f"conversion.release.release.{step}", full)
        with pytest.raises(WorkError) as failure:
            release(chat_checkpoint, out, **options)
    assert f"writing the release {out} failed (No space left on device" in str(failure.value)
    assert "free space" in failure.value.fix
    assert left_behind(out) == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    release(chat_checkpoint, out, **options)


@pytest.mark.parametrize("member", ["instruct-sft", "thinking-sft"])
def test_our_chat_template_passes_every_check(
    member: str, chat_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ours.jinja"
    file.write_text(our_template())
    done = release(
        chat_checkpoint, tmp_path / "out", member=member, chat_template=file, skip_run=True
    )
    assert done.report is not None
    (check,) = [check for check in done.report.checks if check.name == "chat template"]
    assert check.status == "pass"
    for part in ("a system message", "tools", "reasoning (reasoning_content)", "prompt"):
        assert part in check.value
    assert "a turn ends with token 8" in check.value


def test_the_verification_card_has_the_measurements(released: ReleaseResult) -> None:
    card = json.loads((released.path / "verification.json").read_text())
    assert card["member"] == "instruct"
    assert card["checkpoint"] == {"name": "release", "iteration": None}
    assert 0 < card["logits"]["main"]["max_error"] < 1e-2
    assert card["logits"]["mtp"]["relative_error"] < card["logits"]["tolerance"]
    kinds = {
        "embedding",
        "sliding_attention",
        "full_attention",
        "final norm",
        "mtp sliding_attention",
    }
    assert card["logits"]["layers"].keys() == kinds
    figures = {check["name"]: check["figures"] for check in card["checks"]}
    assert figures["greedy equals use_mtp"]["drafted"] > 0
    assert 0 <= figures["MTP acceptance"]["acceptance"] <= 1
    config = (released.path / "config.json").read_bytes()
    assert card["files"]["config.json"] == hashlib.sha256(config).hexdigest()
    text = (released.path / "README.md").read_text()
    assert f"max error {card['logits']['main']['max_error']:.2e}" in text
    assert "| greedy equals use_mtp | pass: the same" in text


def test_the_model_card_is_filled_from_the_run(chat_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "run")
    run = recipe("mellum2_tiny_pretrain")
    (source / "run.yaml").write_text(to_yaml(run))
    code = {"origin": "git", "version": "0.1.0", "commit": "0f" * 20, "dirty": True}
    (source / "provenance.jsonl").write_text(json.dumps({"event": "start", "code": code}) + "\n")
    (source / "release").rename(source / "iter_0000007")
    (source / "latest_checkpointed_iteration.txt").write_text("7")
    table = tmp_path / "eval.json"
    table.write_text(json.dumps({"HumanEval | pass@1": 0.5, "MBPP": {"score": "n/a", "shots": 3}}))
    result = release(source, tmp_path / "out", member="base", evaluation=table, skip_run=True)
    text = (result.path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    tokens = run.schedule.samples(7) * run.data.sequence_length
    for row in (
        "| recipe | mellum2_tiny_pretrain |",
        f"| tokens seen by the end of this run | {tokens:,} (",
        "| started from | random weights |",
        "| step | 7 |",
        f"| optimizer | {run.optimizer.name},",
        "| precision | bf16 |",
        "| layout | tp=1",
        f"| code | mellum2-megatron 0.1.0, commit {'0f' * 20} with uncommitted changes |",
        "| benchmark | score | shots |",
        "| HumanEval \\| pass@1 | 0.5 |  |",
        "| MBPP | n/a | 3 |",
        "This release was not verified by running it.",
        "# Mellum 2 Base (0.03M)",
    ):
        assert row in text, row


@pytest.mark.parametrize("member", MEMBERS)
def test_all_six_members_can_be_released(
    member: str, chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "source")
    if member == "base-pretrain":
        native = RopeParameters(rope_type="default", rope_theta=10000.0)
        write_architecture(source, read_architecture(source).replace(rope_full_attention=native))
    chat = member not in ("base", "base-pretrain")
    result = release(
        source,
        tmp_path / "out",
        member=member,
        chat_template=template if chat else None,
        skip_run=True,
    )
    assert result.report is not None
    assert result.report.check("context").status == "pass"
    assert (result.path / "chat_template.jinja").exists() == chat
    assert check_release(result.path, skip_run=True).member == member


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("base-pretrain", "native context, without YaRN.*Fix: release it as base"),
        ("instrct", "did you mean 'instruct'"),
        ("thinking", "without a chat template.*--chat-template FILE"),
    ],
)
def test_a_member_that_the_checkpoint_is_not(
    member: str, message: str, chat_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        release(chat_checkpoint, tmp_path / "out", member=member)
    assert left_behind(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("name", "member", "trained"),
    [
        ("mellum2_tiny_sft_thinking", "instruct-sft", "thinking-sft"),
        ("mellum2_12b_sft_instruct_8gpu_h200_fp8", "instruct", "instruct-sft"),
        ("mellum2_tiny_rlvr_thinking", "thinking-sft", "thinking"),
        ("mellum2_tiny_long_context", "instruct", "base"),
    ],
)
def test_a_member_that_another_stage_trains(
    name: str, member: str, trained: str, chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "run")
    (source / "run.yaml").write_text(to_yaml(recipe(name)))
    with pytest.raises(InputError, match=f"{name}, which trains {trained}.*--member {trained}"):
        release(source, tmp_path / "out", member=member, chat_template=template)
    check_member_of_run(trained, name)
    check_member_of_run(member, "my_own_run")


def test_a_native_checkpoint_is_base_pretrain_only(
    chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "source")
    native = RopeParameters(rope_type="default", rope_theta=10000.0)
    write_architecture(source, read_architecture(source).replace(rope_full_attention=native))
    with pytest.raises(
        InputError, match=r"YaRN in its full-attention layers.*release it as base-pretrain"
    ):
        release(source, tmp_path / "out", member="instruct", chat_template=template)


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("chat_template", "{% for m in messages %}", "chat template, a turn: TemplateSyntaxError"),
        ("chat_template", "{{ messages[0].content }}", "'It is forty-two.' is not in the text"),
        (
            "chat_template",
            "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}",
            r"<\|turn\|>: markers are",
        ),
        (
            "chat_template",
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "opens the assistant's turn",
        ),
        ("chat_template", "", "without a chat template"),
        ("evaluation", "{", "must be a JSON file"),
        ("evaluation", "[]", "benchmarks and their scores"),
        ("evaluation", '{"a": NaN}', "NaN is no number"),
        ("evaluation", '{"a": [1]}', r"score=\[1\]"),
        ("text", " \n", "holds no text"),
    ],
)
def test_ingredients_are_read_before_anything_is_written(
    option: str, content: str, message: str, chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.write_text(content)
    options: dict[str, Any] = {"chat_template": template, option: given}
    with pytest.raises(InputError, match=message):
        release(chat_checkpoint, tmp_path / "out", member="instruct", **options)
    assert left_behind(tmp_path / "out") == []


def test_a_base_member_takes_no_chat_template(
    chat_checkpoint: Path, template: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="base members continue text"):
        release(chat_checkpoint, tmp_path / "out", member="base", chat_template=template)


def test_a_checkpoint_without_tokenizer_needs_one(
    chat_checkpoint: Path, chat_model: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "source")
    shutil.rmtree(source / "tokenizer")
    with pytest.raises(InputError, match=r"no tokenizer.json.*--tokenizer DIR"):
        release(source, tmp_path / "out", member="base")
    result = release(source, tmp_path / "out", member="base", tokenizer=chat_model, skip_run=True)
    assert (result.path / "tokenizer.json").read_bytes() == (
        chat_model / "tokenizer.json"
    ).read_bytes()


def test_a_release_that_fails_a_check_does_not_appear(
    chat_checkpoint: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(chat_checkpoint, tmp_path / "source")
    tokenizer = source / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<fim_suffix>", "<fim_other>"))
    with pytest.raises(WorkError, match=r"not fit to publish\. FIM tokens:"):
        release(source, tmp_path / "out", member="base", skip_run=True)
    assert left_behind(tmp_path / "out") == []
    result = release(source, tmp_path / "out", member="base", check=False)
    assert result.report is None
    assert "not checked" in str(result)
    assert "was not verified" in (tmp_path / "out" / "README.md").read_text()


def test_an_earlier_release_is_replaced_only_when_asked(
    chat_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    release(chat_checkpoint, target, member="base", check=False)
    (target / "README.md").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        release(chat_checkpoint, target, member="base", check=False)
    assert (target / "README.md").read_text() == "old"
    release(chat_checkpoint, target, member="base", check=False, overwrite=True)
    assert (target / "README.md").read_text() != "old"
    assert left_behind(target) == ["out"]
    with pytest.raises(InputError, match="must not be or hold the source"):
        release(chat_checkpoint, chat_checkpoint, member="base", overwrite=True)


def test_weights_that_compute_something_else_are_not_released(
    chat_checkpoint: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that swaps two experts' weights: every static check passes, the logits do not."""
    import conversion.release.release as module
    from tests.conversion.folders import save_tensors

    export = module.export_hf

    def swapped(source: Path, target: Path, **options: Any) -> Any:
        report = export(source, target, **options)
        tensors = load_tensors(target)
        one, two = (f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]
        save_tensors(target, tensors)
        (target / "weights_manifest.json").unlink()
        return report

    monkeypatch.setattr(module, "export_hf", swapped)
    with pytest.raises(WorkError, match=r"logits equal Megatron's: .* departing at layer 1 "):
        release(chat_checkpoint, tmp_path / "out", member="instruct", chat_template=template)
    assert left_behind(tmp_path / "out") == []


def test_evaluation_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text('[{"benchmark": "A", "pass@1": 0.25}, {"benchmark": "B", "pass@10": 1}]')
    assert read_evaluation(path) == (
        {"benchmark": "A", "pass@1": "0.25"},
        {"benchmark": "B", "pass@10": "1"},
    )


def test_import_of_a_release_is_the_checkpoint_again(
    released: ReleaseResult, tmp_path: Path
) -> None:
    import_hf(released.path, tmp_path / "again")
    assert read_architecture(tmp_path / "again") == read_config(released.path)
    assert (tmp_path / "again" / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE


def test_results_of_mellum2_eval_are_tables(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    task = {"benchmark": "MMLU", "metric": "acc,none", "value": 0.5, "items": 40, "shots": None}
    path.write_text(json.dumps({"format": 1, "tasks": [{**task, "low": 0.25, "high": 0.75}]}))
    assert read_evaluation(path) == (
        {
            "benchmark": "MMLU",
            "metric": "acc,none",
            "value": "0.500 (0.250 to 0.750)",
            "items": "40",
            "shots": "",
        },
    )
    figure = {"name": "found", "value": 0.1, "low": None, "high": None, "items": 2}
    measure = {"name": "needle", "figures": [{**figure, "where": {"length": 1024}}]}
    path.write_text(json.dumps({"format": 1, "measures": [measure]}))
    assert read_evaluation(path) == (
        {"benchmark": "needle 1024", "metric": "found", "value": "0.100", "items": "2"},
    )
    for wrong in ({"format": 1}, {"format": 1, "tasks": [1]}, {"format": 1, "measures": [{}]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="benchmarks and their scores"):
            read_evaluation(path)
