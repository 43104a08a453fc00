"""`mellum2 release`: from a Megatron checkpoint to a folder that can be published, or to nothing at
all."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conversion.convert import export_hf
from conversion.huggingface.folder import GENERATION_CONFIG_FILE, read_json
from conversion.jobs.reports import ConversionReport
from conversion.jobs.result_folder import check_target
from conversion.release.check import Check, ReleaseReport
from conversion.release.check_release import MIN_ACCEPTANCE, read_text, require_acceptance
from conversion.release.file_checks import (
    CARD_FILE,
    LICENSE_FILE,
    VERIFICATION_FILE,
    context_check,
    file_hashes,
    static_checks,
)
from conversion.release.members import CHAT_MEMBERS, require_member
from conversion.release.model_card import CardFacts, Rows, model_card, read_evaluation
from conversion.release.tokenizer_checks import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    end_of_turn,
    read_template,
    render_template,
)
from conversion.verification.verify import VerifyReport
from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.checkpoint import CheckpointFolder, find_checkpoint, read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import move_into_place, size_text, write_json, write_text
from mellum2_megatron.common.provenance import project_root, recorded_code, source_code
from mellum2_megatron.config import Run

PathLike = str | os.PathLike[str]
LOGITS = "logits equal Megatron's"
_PACKAGES = ("mellum2-megatron", "megatron-core", "transformers", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseResult:
    """What a release wrote; ``report`` is None when nothing was checked."""

    conversion: ConversionReport
    report: ReleaseReport | None
    path: Path

    def __str__(self) -> str:
        written = f"{self.conversion.tensors} tensors, {size_text(self.conversion.nbytes)} {self.conversion.dtype}"
        return (
            f"released {self.path}: {written}{'' if self.report is not None else ', not checked'}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A release whose ingredients have all been read and found good; nothing is written yet."""

    member: str
    checkpoint: CheckpointFolder
    tokenizer: Path
    template: str | None
    evaluation: Rows
    run: Run | None
    text: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    logits: VerifyReport | None = None
    checks: tuple[Check, ...] = ()


def release(
    megatron_path: PathLike,
    output: PathLike,
    *,
    member: str,
    evaluation: Path | None = None,
    chat_template: Path | None = None,
    tokenizer: Path | None = None,
    text: Path | None = None,
    min_acceptance: float = MIN_ACCEPTANCE,
    overwrite: bool = False,
    check: bool = True,
    skip_run: bool = False,
) -> ReleaseResult:
    """Write the complete Hugging Face folder of a checkpoint; it appears only when every check of
    it has passed.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it.
        output: folder to write.
        member: which family member the checkpoint is, one of `check_release.MEMBERS`.
        evaluation: JSON table for the model card.
        chat_template: Jinja template of a chat member; by default the one beside the tokenizer.
        tokenizer: folder to take tokenizer files from instead of the checkpoint's own.
        text, min_acceptance: evaluation text for the MTP head and the smallest acceptance on it
            that passes.
        overwrite: replace an earlier release.
        check: without it nothing is verified, and the card says so.
        skip_run: leave out what loads the model (the comparison with Megatron included).

    Raises:
        InputError: an ingredient is missing or does not fit; nothing was written.
        WorkError: writing failed or a check did; nothing was left behind.
    """
    require_acceptance(min_acceptance)
    plan = _plan(megatron_path, member, evaluation, chat_template, tokenizer, text)
    target = Path(output)
    check_target(target, plan.checkpoint.root, overwrite)
    staging = target.parent / f".{target.name}.release"
    folder = staging / target.name
    # Interrupted, or out of disk, the staging folder stays, and the same command continues the
    # export in it.
    try:
        conversion = export_hf(megatron_path, folder, tokenizer=plan.tokenizer, overwrite=True)
    except InputError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        report = _complete(
            folder, plan, Path(megatron_path), conversion.dtype, check, skip_run, min_acceptance
        )
        if report is not None:
            report = replace(report, folder=target)
            _require_ok(report)
        move_into_place(folder, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ReleaseResult(conversion=conversion, report=report, path=target)


def _complete(
    folder: Path,
    plan: _Plan,
    megatron_path: Path,
    dtype: str,
    check: bool,
    skip_run: bool,
    min_acceptance: float,
) -> ReleaseReport | None:
    """Add to the exported folder what a release has beside weights, and check it."""
    _add_files(folder, plan)
    measured = _Measured()
    if check and not skip_run:
        measured = _measure(folder, plan, megatron_path, min_acceptance)
    _write_cards(folder, plan, measured, dtype)
    if not check:
        return None
    checks = (*static_checks(folder, plan.member), *(measured.checks or _left_out()))
    return ReleaseReport(folder=folder, member=plan.member, checks=checks)


# -- before anything is written
# ---------------------------------------------------------------------------------------


def _plan(
    megatron_path: PathLike,
    member: str,
    evaluation: Path | None,
    chat_template: Path | None,
    tokenizer: Path | None,
    text: Path | None,
) -> _Plan:
    require_member(member)
    checkpoint = find_checkpoint(megatron_path)
    context = context_check(checkpoint.architecture, member)
    if context.status == "fail":
        raise InputError(f"--member {member}: {context.value}", rule=context.rule, fix=context.fix)
    tokenizer_dir = tokenizer or checkpoint.tokenizer_dir
    absent = [
        name
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
        if tokenizer_dir is None or not (tokenizer_dir / name).is_file()
    ]
    if tokenizer_dir is None or absent:
        raise InputError(
            f"{tokenizer_dir or checkpoint.root}: no {' and no '.join(absent)}",
            rule="a release has its tokenizer",
            fix="give its folder: --tokenizer DIR",
        )
    run_file = checkpoint.root / RUN_FILE
    return _Plan(
        member=member,
        checkpoint=checkpoint,
        tokenizer=tokenizer_dir,
        template=_template(member, chat_template, tokenizer_dir),
        evaluation=read_evaluation(evaluation) if evaluation is not None else (),
        run=read_run(run_file) if run_file.is_file() else None,
        text=read_text(text) if text is not None else None,
    )


def _template(member: str, given: Path | None, tokenizer: Path) -> str | None:
    """The chat template, rendered once before anything is written; None for base members."""
    if member not in CHAT_MEMBERS:
        if given is not None:
            raise InputError(
                f"--chat-template {given} with --member {member}",
                rule="base members continue text and hold no conversations",
                fix="leave --chat-template out, or release the fine-tuned model as a chat member",
            )
        return None
    if given is not None:
        try:
            template: str | None = given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--chat-template {given}",
                rule=f"it must be readable UTF-8 ({error})",
                fix="name a Jinja file",
            ) from None
    else:
        template = read_template(tokenizer)
    if not template or not template.strip():
        raise InputError(
            f"--member {member} without a chat template",
            rule=f"chat members are used through one, and {tokenizer} has none",
            fix="give the template the model was trained with: --chat-template FILE",
        )
    render_template(tokenizer, template)
    return template


# -- the folder
# -------------------------------------------------------------------------------------------------------


def _add_files(folder: Path, plan: _Plan) -> None:
    write_text(folder / LICENSE_FILE, licence_text())
    if plan.template is None:
        return
    write_text(folder / CHAT_TEMPLATE_FILE, plan.template)
    config = read_json(folder / TOKENIZER_CONFIG_FILE, "the tokenizer has it")
    if (
        config.pop("chat_template", None) is not None
    ):  # one truth: transformers reads the file first
        write_json(folder / TOKENIZER_CONFIG_FILE, config)
    end = end_of_turn(folder, plan.template)
    if end is not None:
        _stop_at(folder / GENERATION_CONFIG_FILE, end)


def _stop_at(path: Path, end: int) -> None:
    """Let generation stop where a turn ends, too."""
    config = read_json(path, "export writes it")
    stops = config.get("eos_token_id")
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if end not in known:
        # Marked as derived from config.json, transformers would take the ids from there.
        config.pop("_from_model_config", None)
        write_json(path, config | {"eos_token_id": [end, *known]})


def licence_text() -> str:
    """The Apache License 2.0, from this package's own metadata or, in a checkout, its root."""
    text = importlib.metadata.distribution("mellum2-megatron").read_text("licenses/LICENSE")
    if text is None:
        path = project_root() / "LICENSE"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "Apache License" not in text:
        raise WorkError("this package was installed without its LICENSE", fix="install it again")
    return text


def _measure(folder: Path, plan: _Plan, megatron_path: Path, min_acceptance: float) -> _Measured:
    """Run the folder, and compare it with the checkpoint it was made from."""
    from conversion.release.model_checks import running_checks
    from conversion.verification.verify import verify

    logits = verify(megatron_path, folder)
    worst = max(head.relative_error for head in (logits.main, logits.mtp) if head is not None)
    if logits.ok:
        check = Check.passed(LOGITS, f"largest relative error {worst:.2e}")
    else:
        departs = logits.first_departing
        check = Check.failed(
            LOGITS,
            f"largest relative error {worst:.2e}"
            + (f", departing at {departs.name}" if departs is not None else ""),
            rule=f"transformers computes what Megatron computes, within {logits.tolerance:g}",
            fix="run mellum2 verify",
        )
    return _Measured(
        logits=logits,
        checks=(*running_checks(folder, text=plan.text, min_acceptance=min_acceptance), check),
    )


def _left_out() -> list[Check]:
    from conversion.release.model_checks import skipped_checks

    why = "left out (--skip-run)"
    return [*skipped_checks(why), Check.not_applicable(LOGITS, why)]


def _write_cards(folder: Path, plan: _Plan, measured: _Measured, dtype: str) -> None:
    """Write verification.json and README.md."""
    architecture: Mellum2Architecture = plan.checkpoint.architecture
    ran = [
        check
        for check in measured.checks
        if check.name != LOGITS and check.status != "not applicable"
    ]
    verification: dict[str, Any] = {
        "member": plan.member,
        "software": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "checkpoint": {
            "name": plan.checkpoint.iteration_dir.name,
            "iteration": plan.checkpoint.iteration,
        },
        "logits": measured.logits.to_dict() if measured.logits is not None else None,
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "value": check.value,
                "figures": dict(check.figures),
            }
            for check in measured.checks
        ],
        "files": file_hashes(folder),
    }
    write_json(folder / VERIFICATION_FILE, verification)
    facts = CardFacts(
        member=plan.member,
        architecture=architecture,
        run=plan.run,
        iteration=plan.checkpoint.iteration,
        dtype=dtype,
        evaluation=plan.evaluation,
        logits=measured.logits,
        measured=[(check.name, f"{check.status}: {check.value}") for check in ran],
        code=source_code(),
        trained_with=recorded_code(plan.checkpoint.root),
    )
    write_text(folder / CARD_FILE, model_card(facts))


def _require_ok(report: ReleaseReport) -> None:
    if report.ok:
        return
    told = "; ".join(
        f"{check.name}: {check.value} ({check.rule}; fix: {check.fix})" for check in report.failures
    )
    raise WorkError(
        f"{report.folder} is not fit to publish. {told}",
        fix="repair what it names and release again; nothing was written (--no-check writes the folder as it is)",
    )
