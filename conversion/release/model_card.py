"""The model card of a release, README.md, from the checkpoint, its run and the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.release.members import BASE_PRETRAIN, CHAT_MEMBERS
from conversion.verification.verify import VerifyReport
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import read_text
from mellum2_megatron.common.json_files import parse_json
from mellum2_megatron.common.provenance import Code
from mellum2_megatron.config import Run

Rows = tuple[Mapping[str, str], ...]
"""Rows of a table, each as column -> cell."""

TITLES = {
    BASE_PRETRAIN: "Base-Pretrain",
    "base": "Base",
    "instruct-sft": "Instruct-SFT",
    "thinking-sft": "Thinking-SFT",
    "instruct": "Instruct",
    "thinking": "Thinking",
}
_STAGES = {
    BASE_PRETRAIN: "pre-training at the native context length",
    "base": "pre-training and the long-context stage (YaRN on the full-attention layers)",
    "instruct-sft": "supervised fine-tuning on instructions",
    "thinking-sft": "supervised fine-tuning on instructions with reasoning",
    "instruct": "reinforcement learning after instruction tuning",
    "thinking": "reinforcement learning after tuning with reasoning",
}
# YAML header with the keys that the Hugging Face hub reads.
_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- code
- mixture-of-experts
- mellum
---
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """Facts that a model card states.

    Attributes:
        member: family member.
        architecture: architecture of the checkpoint.
        run: resolved run that trained the checkpoint; None if none is recorded.
        iteration: optimizer step of the checkpoint; None for an imported one.
        dtype: dtype of the weights.
        evaluation: rows of the evaluation table; empty without an evaluation.
        logits: comparison of Megatron's logits with transformers'; None if there was none.
        measured: (name, outcome) of the checks that ran the model.
        code: version of this project that writes the release.
        trained_with: versions of this project that trained the run, in order; default none, if none
            is recorded.
    """

    member: str
    architecture: Mellum2Architecture
    run: Run | None
    iteration: int | None
    dtype: str
    evaluation: Rows
    logits: VerifyReport | None
    measured: Sequence[tuple[str, str]]
    code: Code
    trained_with: Sequence[Code] = ()


def read_evaluation(path: Path) -> Rows:
    """Read an evaluation table from a JSON file.

    Its form is ``{"benchmark": score}``, ``{"benchmark": {"metric": score}}``, a list of rows, or
    the result of `mellum2 eval`.

    Raises:
        InputError: the file is unreadable or of another form, or a cell is neither text nor a
            finite number.
    """
    try:
        value = parse_json(read_text(path, f"--eval {path}", fix="name a JSON file"))
    except ValueError as error:
        raise InputError(
            f"--eval {path}", rule=f"it must be a JSON file ({error})", fix="name one"
        ) from None
    if isinstance(value, dict) and "format" in value:
        value = _rows_of_eval(value)
    elif isinstance(value, dict):
        # One row for each benchmark: all forms become a list of rows.
        value = [
            {"benchmark": name, **(row if isinstance(row, dict) else {"score": row})}
            for name, row in value.items()
        ]
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(isinstance(row, dict) and row for row in value):
        raise InputError(
            f"--eval {path}",
            rule="it holds benchmarks and their scores, or a list of rows",
            fix='write {"HumanEval pass@1": 0.5} or [{"benchmark": "HumanEval", "pass@1": 0.5}]',
        )
    return tuple({str(key): _cell(path, key, cell) for key, cell in row.items()} for row in value)


def _rows_of_eval(result: dict[str, Any]) -> Any:
    """Return the rows of a result of `mellum2 eval`: of its measures, or of the harness' tasks."""
    try:
        return [
            {
                "benchmark": task["benchmark"],
                "metric": task["metric"],
                "value": f"{task['value']:.3f}{_interval(task)}",
                "items": task["items"],
                "shots": "" if task["shots"] is None else task["shots"],
            }
            for task in result.get("tasks", ())
        ] + [
            {
                "benchmark": " ".join([measure["name"], *map(str, figure["where"].values())]),
                "metric": figure["name"],
                "value": f"{figure['value']:.3f}{_interval(figure)}",
                "items": figure["items"],
            }
            for measure in result.get("measures", ())
            for figure in measure["figures"]
        ]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _interval(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return ""
    return f" ({figure['low']:.3f} to {figure['high']:.3f})"


def _cell(path: Path, key: str, value: Any) -> str:
    """Return a cell as text; InputError if it is neither text nor a finite number."""
    if isinstance(value, str):
        return value
    # Python counts JSON's true and false as ints, and its reader accepts NaN and Infinity.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(
            f"--eval {path}: {key}={value!r}",
            rule="a cell is text or a finite number",
            fix="correct it",
        )
    return f"{value:g}"


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown with its YAML header."""
    commit = f" ({facts.code})" if facts.code.commit else ""
    intro = (
        "A mixture-of-experts language model for code, of JetBrains' Mellum 2 architecture. "
        f"Stage: {_STAGES[facts.member]}. "
        f"Exported with mellum2-megatron {facts.code.version}{commit}."
    )
    sections = [
        f"# Mellum 2 {TITLES[facts.member]} ({parameters_text(facts.architecture)})",
        intro,
        "## Model\n\n" + _model(facts),
        "## Training\n\n" + _training(facts),
        "## Evaluation\n\n" + _evaluation(facts.evaluation),
        "## Use\n\n" + _use(facts),
        "## Intended use and limitations\n\n" + _limits(facts.member),
        "## Verification\n\n" + _verification(facts),
        "## Licence\n\nApache 2.0; see LICENSE.",
    ]
    return _HEAD + "\n" + "\n\n".join(sections) + "\n"


def parameters_text(architecture: Mellum2Architecture) -> str:
    """Return the number of parameters without the MTP head, in billions or millions.

    >>> from mellum2_megatron.architecture import PRESETS
    >>> parameters_text(PRESETS["mellum2-12b"])
    '12.1B'
    """
    count = architecture.num_parameters(mtp=False)
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"


def _model(facts: CardFacts) -> str:
    model = facts.architecture
    parameters = model.num_parameters(mtp=False)
    active = model.num_active_parameters(mtp=False)
    full = model.layer_types.count("full_attention")
    sliding = model.num_hidden_layers - full
    rope = model.rope_full_attention
    extension = "native"
    if rope.factor is not None:
        extension = f"YaRN x{rope.factor:g} in full-attention layers"
    mtp = "none"
    if model.num_mtp_layers:
        mtp = f"{model.num_mtp_layers} layer, for speculative decoding"
    rows = [
        ("parameters", f"{parameters:,} ({active:,} active)"),
        ("MTP head", mtp),
        ("layers", f"{sliding} with sliding windows of {model.sliding_window}, {full} full"),
        ("experts", f"{model.num_experts}, {model.num_experts_per_tok} per token"),
        ("context", f"{model.max_position_embeddings:,} tokens, {extension}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("weights", f"{facts.dtype}, safetensors"),
    ]
    return _table(("", ""), rows)


def _training(facts: CardFacts) -> str:
    run = facts.run
    if run is None:
        return (
            "No run is recorded beside the checkpoint this release was made from, "
            "so nothing is stated here."
        )
    schedule, optimizer, layout = run.schedule, run.optimizer, run.layout
    length = run.data.sequence_length
    # An imported checkpoint has no step: take the end of the run.
    if facts.iteration is None:
        samples, step = schedule.train_samples, "not recorded"
    else:
        samples, step = schedule.samples(facts.iteration), f"{facts.iteration:,}"
    if run.checkpoint.load is not None:
        start = "the weights of an earlier checkpoint"
    elif run.checkpoint.continue_from is not None:
        start = "the state of an earlier run"
    else:
        start = "random weights"
    # Several: a run may be resumed with newer code.
    versions = [f"mellum2-megatron {code.version}, {code}" for code in facts.trained_with]
    ways = [f"{name}={getattr(layout, name)}" for name in ("tp", "pp", "vpp", "ep", "etp", "cp")]
    batches = [f"{size} from sample {first:,}" for first, size in schedule.batch_schedule]
    rows = [
        ("recipe", run.name),
        ("what it is", run.description),
        (
            "tokens seen by the end of this run",
            f"{samples * length:,} ({samples:,} sequences)",
        ),
        ("started from", start),
        ("step", step),
        ("sequence length", f"{length:,}"),
        ("sequences a step", ", ".join(batches)),
        ("optimizer", f"{optimizer.name}, weight decay {optimizer.weight_decay:g}"),
        ("learning rate", f"{optimizer.lr:g} at its peak, {schedule.style}"),
        (
            "warm-up and decay",
            f"{schedule.warmup_samples:,} and {schedule.decay_samples:,} sequences",
        ),
        ("precision", run.precision.compute),
        ("layout", " ".join(ways)),
        ("seed", str(run.seed)),
        ("code", "; later ".join(versions) or "not recorded"),
    ]
    return _table(("", ""), rows)


def _evaluation(rows: Rows) -> str:
    if not rows:
        return "No evaluation was given for this release."
    # Rows may have different metrics: take the columns of all rows, in order of appearance.
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return _table(columns, [tuple(row.get(column, "") for column in columns) for row in rows])


def _use(facts: CardFacts) -> str:
    prompt = 'inputs = tokenizer("def fibonacci(n):", return_tensors="pt")'
    if facts.member in CHAT_MEMBERS:
        prompt = (
            'messages = [{"role": "user", "content": "Reverse a string in Kotlin."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    mtp = ", use_mtp=True" if facts.architecture.num_mtp_layers else ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
        f"{prompt}\n"
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64{mtp})[0]))"
    )
    return f"transformers 5.23 or later.\n\n```python\n{code}\n```"


def _limits(member: str) -> str:
    use = (
        "Completion of code, fill-in-the-middle included, and a starting point for fine-tuning. "
        "It follows no instructions: it continues text."
    )
    if member in CHAT_MEMBERS:
        use = "Assistance with code in conversation: explaining, writing and changing it."
    lines = [
        use,
        "It writes wrong, insecure or outdated code that looks right. "
        "Review and test what it writes.",
        "It may repeat passages of its training data, whose licences may differ from the model's.",
        "Languages and topics that are rare in the training data fare worse; prose above all.",
        "No safety evaluation is part of this card. It is not meant for decisions about people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _verification(facts: CardFacts) -> str:
    if facts.logits is None and not facts.measured:
        return "This release was not verified by running it."
    rows: list[tuple[str, str]] = []
    if facts.logits is not None:
        for name, head in (("main", facts.logits.main), ("MTP", facts.logits.mtp)):
            if head is not None:
                errors = f"max error {head.max_error:.2e}, same top-1 {head.top1:.2%}"
                rows.append((f"logits against Megatron, {name}", errors))
    rows += facts.measured
    note = (
        "Hashes of every tensor are in `weights_manifest.json`, "
        "of every other file in `verification.json`."
    )
    return _table(("check", "outcome"), rows) + "\n\n" + note


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    # Bars and line breaks would end a cell, so they are escaped or become blanks.
    lines = []
    for row in (columns, ["---"] * len(columns), *rows):
        cells = [" ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split()) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
