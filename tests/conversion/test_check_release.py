"""Checks of a release folder: each fails for its own damage, and good folders pass."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conversion.huggingface.format import INDEX_FILE
from conversion.huggingface.generation import Generation
from conversion.release import model_checks
from conversion.release.check import Check
from conversion.release.check_release import NEEDED_TO_RUN, check_release
from conversion.release.release import ReleaseResult
from mellum2_megatron.cli import app as cli
from mellum2_megatron.common.errors import InputError
from tests.conversion.folders import load_tensors, save_tensors, unfused
from tests.conversion.releases import TEMPLATE, edit_json, write_model

Damage = Callable[[Path], None]


@pytest.fixture
def folder(released: ReleaseResult, tmp_path: Path) -> Path:
    """A copy of a good release to damage, without the hashes that any damage would break."""
    path = Path(shutil.copytree(released.path, tmp_path / "copy"))
    (path / "verification.json").unlink()
    (path / "weights_manifest.json").unlink()
    return path


def failures(folder: Path, **options: object) -> list[Check]:
    report = check_release(folder, **{"skip_run": True, "member": "instruct", **options})  # type: ignore[arg-type]
    assert report.ok == (not report.failures)
    return list(report.failures)


def config(**changes: object) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def generation(**changes: object) -> Damage:
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def text(name: str, old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))

    return damage


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content) and None


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, torch.Tensor]], object], files: int = 1) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_tensors(folder)
        change(weights)
        save_tensors(folder, weights, files)

    return damage


def rope(kind: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
        parameters[kind] |= changes
        edit_json(folder / "config.json", rope_parameters=parameters)

    return damage


def drop_rope(folder: Path) -> None:
    parameters = json.loads((folder / "config.json").read_text())["rope_parameters"]
    del parameters["sliding_attention"]
    edit_json(folder / "config.json", rope_parameters=parameters)


def drop_mtp(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if name.startswith("mtp.")]:
        del weights[name]


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: (
        weights["model.layers.1.mlp.experts.2.up_proj.weight"].view(-1)[7].fill_(value)
    )


def shard_without_file(folder: Path) -> None:
    tensors(lambda weights: None, files=3)(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def unlisted(folder: Path) -> None:
    tensors(lambda weights: None, files=2)(folder)
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def link_outside(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "notes.txt").symlink_to(secret)


def unmark(token: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        next(row for row in values["added_tokens"] if row["content"] == token)["special"] = False
        path.write_text(json.dumps(values))

    return damage


def test_a_good_release_passes(released: ReleaseResult, folder: Path) -> None:
    report = check_release(released.path, skip_run=True)
    assert report.ok
    assert report.member == "instruct"  # from its verification card
    assert set(NEEDED_TO_RUN) <= {check.name for check in report.checks}
    assert failures(folder) == []
    assert failures(folder, member=None) == []


NO_TOOLS = TEMPLATE.replace("tools | tojson", "'none'")
NO_THOUGHT = TEMPLATE.replace("+ message.reasoning_content +", "+")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("nothing executable", write("pytorch_model.bin", "x"), r"pytorch_model\.bin"),
        ("nothing executable", write("modeling_mellum.py", "x"), r"modeling_mellum\.py"),
        ("nothing executable", config(auto_map={"AutoModel": "m.M"}), "auto_map in config.json"),
        ("nothing executable", link_outside, "may not leave"),
        ("config", config(model_type="llama"), "model_type='llama'"),
        ("config", remove("config.json"), "config.json is missing"),
        ("config", config(num_experts_per_tok=9), "num_experts_per_tok"),
        ("layer types", config(layer_types=None), "layer_types absent"),
        ("layer types", config(sliding_window=None), "sliding_window absent"),
        (
            "rope, context",
            config(rope_parameters=None),
            "without full_attention, sliding_attention",
        ),
        ("config", drop_rope, "sliding_attention"),
        ("rope", rope("full_attention", attention_factor=1.0), r"attention_factor=1\.0.*1\.138629"),
        ("rope", config(max_position_embeddings=32), "set max_position_embeddings to 128"),
        (
            "rope",
            rope(
                "sliding_attention",
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
            ),
            "full-attention layers only",
        ),
        (
            "context",
            rope("full_attention", rope_type="default"),
            "instruct comes after the long-context stage",
        ),
        ("files", remove("model.safetensors"), r"no \*\.safetensors"),
        ("files", shard_without_file, "model-00002-of-00003.safetensors missing"),
        ("files", unlisted, "model.norm.weight not listed"),
        (
            "tensors",
            tensors(lambda weights: weights.pop("model.norm.weight")),
            "model.norm.weight missing",
        ),
        (
            "tensors",
            tensors(lambda weights: weights.update(extra=torch.zeros(2, dtype=torch.bfloat16))),
            "extra not part",
        ),
        ("tensors", tensors(lambda weights: weights.pop("mtp.fc.weight")), "mtp.fc.weight missing"),
        ("MTP head", tensors(drop_mtp), "num_nextn_predict_layers=1, 0 in the tensors"),
        (
            "MTP head",
            config(num_nextn_predict_layers=0),
            "num_nextn_predict_layers=0, 1 in the tensors",
        ),
        (
            "shapes",
            tensors(
                lambda weights: weights.update(
                    {"lm_head.weight": torch.zeros(320, 23, dtype=torch.bfloat16)}
                )
            ),
            r"lm_head.weight \[320, 23\]",
        ),
        ("dtypes", config(dtype="float32"), "dtype='float32' in config.json, tensors are bfloat16"),
        (
            "dtypes",
            tensors(lambda weights: weights.update({"model.norm.weight": torch.ones(24)})),
            "float32",
        ),
        ("finite", tensors(poison(float("nan"))), r"experts\.2\.up_proj\.weight \(1 of 288\)"),
        ("finite", tensors(poison(float("inf"))), r"experts\.2\.up_proj\.weight \(1 of 288\)"),
        ("tokenizer files", remove("tokenizer.json"), "tokenizer.json missing"),
        ("tokenizer files", write("tokenizer.json", "{}"), "not a valid tokenizer"),
        (
            "special tokens, chat template",
            remove("generation_config.json"),
            "generation_config.json is missing",
        ),
        ("special tokens", config(bos_token_id=7), r"bos_token_id: \[7\] in config.json"),
        ("special tokens", config(eos_token_id=5), r"eos_token_id: \[5\] in config.json"),
        (
            "special tokens",
            generation(pad_token_id=9),
            r"pad_token_id: \[9\] in generation_config.json",
        ),
        (
            "special tokens, chat template",
            generation(eos_token_id=["a", 1, [2]]),
            "ids are whole numbers",
        ),
        ("special tokens", generation(eos_token_id=[8, 1, 320]), "names id 320"),
        ("special tokens", unmark("</s>"), "eos token not marked special"),
        (
            "FIM tokens",
            text("tokenizer.json", "<fim_middle>", "<fim_mittle>"),
            "fim_middle.* missing",
        ),
        ("FIM tokens", unmark("<fim_prefix>"), "fim_prefix not marked special"),
        ("chat template", remove("chat_template.jinja"), "no chat_template.jinja"),
        ("chat template", write("chat_template.jinja", "{{ nowhere.at.all }}"), "UndefinedError"),
        (
            "chat template",
            write("chat_template.jinja", NO_TOOLS),
            "tools: 'multiply_numbers' is not in the text",
        ),
        (
            "chat template",
            write("chat_template.jinja", NO_THOUGHT),
            r"reasoning \(reasoning_content\)",
        ),
        (
            "chat template",
            text("chat_template.jinja", "<|im_end|>", "<|end|>"),
            r"<\|end\|>: markers are special",
        ),
        (
            "chat template",
            text("chat_template.jinja", "if add_generation_prompt", "if false"),
            "add_generation_prompt",
        ),
        ("chat template", generation(eos_token_id=1), r"an answer ends with token 8.* is \[1\]"),
        ("model card", write("README.md", "# Mellum"), "8 characters"),
        ("model card", remove("README.md"), "0 characters"),
        ("licence", remove("LICENSE"), "missing"),
        ("licence", write("LICENSE", "All rights reserved."), "another text"),
    ],
)
def test_one_damage_fails_its_check_alone(
    name: str, damage: Damage, message: str, folder: Path
) -> None:
    damage(folder)
    failed = failures(folder)
    assert [check.name for check in failed] == name.split(", ")
    messages = " / ".join(f"{check.value}: {check.rule}. Fix: {check.fix}." for check in failed)
    assert re.search(message, messages)
    assert all(check.rule and check.fix for check in failed)


def test_tokenizer_larger_than_the_vocabulary_fails(folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "small", vocab_size=319)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(other / name, folder / name)
    (check,) = [check for check in failures(folder) if check.name == "tokenizer vocabulary"]
    assert check.value == "highest token id 319"
    assert "0 to 318" in check.rule


def test_a_changed_weight_differs_from_the_manifest(
    released: ReleaseResult, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(released.path, tmp_path / "copy"))
    tensors(lambda weights: weights["lm_head.weight"][3, 4].add_(1))(path)
    (check,) = failures(path)
    assert (check.name, check.value) == ("manifest", "lm_head.weight")


def test_a_changed_file_differs_from_the_verification_card(
    released: ReleaseResult, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(released.path, tmp_path / "copy"))
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # hubs add their own files
    assert failures(path) == []
    text("chat_template.jinja", "message.role", "message['role']")(path)
    (check,) = failures(path)
    assert (check.name, check.value) == ("verification card", "chat_template.jinja")


def test_checks_that_load_the_model_are_left_out_after_damage(folder: Path) -> None:
    tensors(poison(float("nan")))(folder)
    report = check_release(folder)
    running = [
        check for check in report.checks if check.name in ("loads in transformers", "generates")
    ]
    assert [check.status for check in running] == ["not applicable"] * 2
    assert "finite" in running[0].value


def test_a_folder_that_transformers_cannot_load(folder: Path) -> None:
    config(model_type=None)(folder)  # readable for us by its architectures, not for AutoModel
    (check,) = failures(folder, skip_run=False)
    assert check.name == "loads in transformers"


def test_a_folder_that_cannot_generate(folder: Path) -> None:
    native = {"rope_type": "default", "rope_theta": 10000.0}
    config(
        max_position_embeddings=4,
        rope_parameters=dict.fromkeys(["full_attention", "sliding_attention"], native),
    )(folder)
    (check,) = failures(folder, skip_run=False, member=None)
    assert check.name == "generates"
    assert "max_position_embeddings=4" in check.rule


def test_greedy_text_that_depends_on_the_mtp_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parting(path: Path, prompt: str, *, use_mtp: bool = False, **options: object) -> Generation:
        ids = (5, 6, 8) if use_mtp else (5, 6, 7)
        return Generation(
            prompt=prompt, completion="", prompt_ids=(1,), token_ids=ids, drafted=2, accepted=1
        )

    monkeypatch.setattr(model_checks, "generate", parting)
    (check,) = failures(folder, skip_run=False)
    assert (check.name, check.value) == ("greedy equals use_mtp", "the texts part at new token 2")


def test_acceptance_below_the_floor_fails(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("def model_index(self):\n    return scale\n" * 5)
    (check,) = failures(folder, skip_run=False, text=words)
    assert check.name == "MTP acceptance"
    assert check.figures["acceptance"] < 0.5
    words.write_text("a")
    (check,) = failures(folder, skip_run=False, text=words)
    assert check.rule == "acceptance is a share of many positions"


def test_a_folder_made_by_transformers_alone(tmp_path: Path) -> None:
    """Fused experts lose nothing; only the MTP head and the documents are missing."""
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / "saved" / name)
    failed = {check.name for check in failures(tmp_path / "saved", member=None)}
    assert failed == {"MTP head", "model card", "licence"}
    before, after = load_tensors(source), unfused(load_tensors(tmp_path / "saved"))
    assert after.keys() == {name for name in before if not name.startswith("mtp.")}
    assert all(before[name].equal(after[name]) for name in after)


def test_invalid_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder"):
        check_release(tmp_path / "nowhere")
    with pytest.raises(InputError, match="must be a folder"):
        check_release(folder / "config.json")
    with pytest.raises(InputError, match="did you mean 'thinking-sft'"):
        check_release(folder, member="thinkin-sft")
    with pytest.raises(InputError, match="between 0 and 1"):
        check_release(folder, min_acceptance=50)
    with pytest.raises(InputError, match="--text"):
        check_release(folder, text=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    failed = [check.name for check in failures(tmp_path / "empty")]
    assert failed == ["config", "files", "tokenizer files", "model card", "licence"]


def test_the_report_as_data_and_as_table(folder: Path) -> None:
    from rich.console import Console

    (folder / "LICENSE").unlink()
    report = check_release(folder, skip_run=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert [row["status"] for row in data["checks"] if row["name"] == "licence"] == ["fail"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    shown = console.export_text()
    assert "NOT fit to publish" in shown
    assert "LICENSE: missing" in shown
    assert all(check.name in shown for check in report.checks)


def test_exit_codes_of_the_command(
    released: ReleaseResult, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> object:
        monkeypatch.setattr("sys.argv", ["mellum2", "check-release", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code

    assert run(released.path, "--skip-run") == 0
    (folder / "LICENSE").unlink()
    assert run(folder, "--skip-run", "--json") == 1
    assert run(folder / "nowhere") == 2


def test_the_command_prints_json(released: ReleaseResult) -> None:
    result = CliRunner().invoke(
        cli.app, ["check-release", str(released.path), "--skip-run", "--json"]
    )
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (0, True)
