"""`mellum2 release`: write a complete, checked Hugging Face folder of a checkpoint, or nothing."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.convert import export_hf
from conversion.huggingface.format import (
    CARD_FILE,
    GENERATION_CONFIG_FILE,
    LICENSE_FILE,
    VERIFICATION_FILE,
    read_json,
)
from conversion.jobs.reports import ConversionReport
from conversion.jobs.result_folder import check_target
from conversion.release.chat_template import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    end_of_turn,
    render_template,
)
from conversion.release.check import Check, ReleaseReport
from conversion.release.check_release import (
    MIN_ACCEPTANCE,
    read_evaluation_text,
    require_acceptance,
)
from conversion.release.config_checks import context
from conversion.release.file_checks import file_checks, file_hashes
from conversion.release.members import CHAT_MEMBERS, check_member_of_run, require_member
from conversion.release.model_card import CardFacts, Rows, model_card, read_evaluation
from conversion.release.model_checks import model_checks, model_checks_left_out
from conversion.verification.verify import VerifyReport, verify
from mellum2_megatron.checkpoint import CheckpointFolder, find_checkpoint, read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.files import (
    move_into_place,
    read_text,
    size_text,
    write_json,
    write_text,
)
from mellum2_megatron.common.provenance import project_root, recorded_code, source_code
from mellum2_megatron.common.staging import remove_leftovers
from mellum2_megatron.config import Run
from mellum2_megatron.data.chat.template import CHAT_TEMPLATE_FILE, read_template

PathLike = str | os.PathLike[str]

LOGITS = "logits equal Megatron's"

_LOCK = ".lock"
_SOFTWARE = ("mellum2-megatron", "megatron-core", "transformers", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseResult:
    """A written release.

    Attributes:
        conversion: report of the export.
        report: outcomes of the checks; None if nothing was checked.
        path: released folder.
    """

    conversion: ConversionReport
    report: ReleaseReport | None
    path: Path

    def __str__(self) -> str:
        written = self.conversion
        size = f"{written.tensors} tensors, {size_text(written.nbytes)} {written.dtype}"
        return f"released {self.path}: {size}" + ("" if self.report else ", not checked")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ingredients:
    """Everything that a release is made of, read and checked before anything is written.

    Attributes:
        member: family member.
        checkpoint: checkpoint to export.
        tokenizer: folder of the tokenizer files.
        template: text of the chat template; None for base members.
        evaluation: rows of the model card's table; empty without --eval.
        run: resolved run beside the checkpoint; None without one.
        text: evaluation text for the MTP head's acceptance; None without --text.
    """

    member: str
    checkpoint: CheckpointFolder
    tokenizer: Path
    template: str | None
    evaluation: Rows
    run: Run | None
    text: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Measurements with the exported model; empty if it was not run.

    Attributes:
        logits: comparison with Megatron's logits; default None.
        checks: outcomes of the checks that load the model, that of the logits last; default none.
    """

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
    """Write the complete Hugging Face folder of a checkpoint.

    The folder appears only when every check of it has passed.

    Args:
        megatron_path: checkpoint folder, or one iteration inside it.
        output: folder to write.
        member: family member, one of `members.MEMBERS`.
        evaluation: JSON table of scores for the model card, default none.
        chat_template: Jinja template of a chat member, default the one beside the tokenizer.
        tokenizer: folder of tokenizer files, default the checkpoint's own.
        text: file on which the MTP head's acceptance is measured; None leaves that check out.
        min_acceptance: smallest acceptance on ``text`` that passes, 0 to 1; default 0.5.
        overwrite: replace an earlier release, default False.
        check: check the folder, default True; the card of an unchecked one states so.
        skip_run: leave out the checks that load the model, comparison with Megatron included;
            default False.

    Raises:
        InputError: an ingredient is missing or does not fit; nothing was written.
        WorkError: writing or a check failed; no folder appears.
    """
    require_acceptance(min_acceptance)
    ingredients = _read_ingredients(
        megatron_path,
        member,
        evaluation=evaluation,
        chat_template=chat_template,
        tokenizer=tokenizer,
        text=text,
    )
    target = Path(output)
    staging = target.parent / f".{target.name}.release"
    remove_leftovers(target.parent, target.name)
    if staging.is_dir():
        with _locked(staging):  # one that was killed after the release had its name goes
            pass
    check_target(target, ingredients.checkpoint.root, overwrite)
    # Everything is written beside the target, on the same disk, and takes its name at the end. An
    # interrupted export stays: the same command continues it.
    with _writing(target), _locked(staging):
        folder = staging / target.name
        # Of an attempt that was killed after its export: its files may be incomplete.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            conversion = export_hf(megatron_path, folder, tokenizer=ingredients.tokenizer)
        except InputError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        report = None
        try:
            _add_files(folder, ingredients)
            measured = _Measured()
            if check and not skip_run:
                measured = _measure(folder, ingredients, megatron_path, min_acceptance)
            _write_cards(folder, ingredients, measured, conversion.dtype)
            if check:
                # After the cards, which are checked too.
                why = "left out (--skip-run)"
                left_out = (*model_checks_left_out(why), Check.not_applicable(LOGITS, why))
                checks = (*file_checks(folder, member), *(measured.checks or left_out))
                report = ReleaseReport(folder=target, member=member, checks=checks)
                _require_ok(report)
            move_into_place(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return ReleaseResult(conversion=conversion, report=report, path=target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn an error of the operating system, such as a full disk, into one of the release.

    Raises:
        WorkError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"writing the release {target} failed ({first_line(error)}); nothing was released",
            fix="free space on that disk and check its permissions, or choose another --output",
        ) from error


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """Make a staging folder and lock it; it is removed at the end if nothing is in it.

    Raises:
        InputError: another process writes the same release.
    """
    staging.mkdir(parents=True, exist_ok=True)
    try:
        lock_file = (staging / _LOCK).open("w")
    except OSError:
        with suppress(OSError):
            staging.rmdir()  # unless there is an export to continue
        raise
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                str(staging),
                rule="another process is writing this release",
                fix="wait for it, or end it",
            ) from None
        try:
            yield
        finally:
            # After bad input the folder is gone already.
            if staging.is_dir() and [entry.name for entry in staging.iterdir()] == [_LOCK]:
                shutil.rmtree(staging, ignore_errors=True)


def _read_ingredients(
    megatron_path: PathLike,
    member: str,
    *,
    evaluation: Path | None,
    chat_template: Path | None,
    tokenizer: Path | None,
    text: Path | None,
) -> _Ingredients:
    """Read and check everything that the release is made of; arguments as of `release`.

    Raises:
        InputError: an ingredient is missing or does not fit.
    """
    require_member(member)
    checkpoint = find_checkpoint(megatron_path)
    run_file = checkpoint.root / RUN_FILE
    run = read_run(run_file) if run_file.is_file() else None
    if run is not None:
        check_member_of_run(member, run.name)
    # `file_checks` checks it in the result again, but only after an export of minutes.
    outcome = context(checkpoint.architecture, member)
    if outcome.status == "fail":
        raise InputError(f"--member {member}: {outcome.value}", rule=outcome.rule, fix=outcome.fix)
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
    return _Ingredients(
        member=member,
        checkpoint=checkpoint,
        tokenizer=tokenizer_dir,
        template=_read_chat_template(member, chat_template, tokenizer_dir),
        evaluation=read_evaluation(evaluation) if evaluation is not None else (),
        run=run,
        text=read_evaluation_text(text) if text is not None else None,
    )


def _read_chat_template(member: str, given: Path | None, tokenizer: Path) -> str | None:
    """Return the chat template, rendered once as a test; None for base members."""
    if member not in CHAT_MEMBERS:
        if given is not None:
            raise InputError(
                f"--chat-template {given} with --member {member}",
                rule="base members continue text and hold no conversations",
                fix="leave --chat-template out, or release the fine-tuned model as a chat member",
            )
        return None
    if given is None:
        template = read_template(tokenizer)
    else:
        template = read_text(given, f"--chat-template {given}", fix="name a Jinja file")
    if not template or not template.strip():
        raise InputError(
            f"--member {member} without a chat template",
            rule=f"chat members are used through one, and {tokenizer} has none",
            fix="give the template the model was trained with: --chat-template FILE",
        )
    render_template(tokenizer, template)
    return template


def _add_files(folder: Path, ingredients: _Ingredients) -> None:
    """Add the licence and, for chat members, the template and the token that ends a turn."""
    write_text(folder / LICENSE_FILE, licence_text())
    template = ingredients.template
    if template is None:
        return
    write_text(folder / CHAT_TEMPLATE_FILE, template)
    config = read_json(folder / TOKENIZER_CONFIG_FILE, "the tokenizer has it")
    # transformers would ignore a second template in the tokenizer's configuration.
    if config.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG_FILE, config)
    end = end_of_turn(folder, template)
    if end is None:
        return
    path = folder / GENERATION_CONFIG_FILE
    generation = read_json(path, "export writes it")
    stops = generation.get("eos_token_id")
    if stops is None:
        stops = []
    elif not isinstance(stops, list):
        stops = [stops]
    if end not in stops:
        # The mark of settings that transformers derived from config.json: no longer true.
        generation.pop("_from_model_config", None)
        write_json(path, generation | {"eos_token_id": [end, *stops]})


def licence_text() -> str:
    """Return the Apache License 2.0.

    Raises:
        WorkError: neither the package nor the checkout has it.
    """
    # An installed package has it in its metadata (PEP 639), a checkout in its root.
    text = importlib.metadata.distribution("mellum2-megatron").read_text("licenses/LICENSE")
    if text is None:
        path = project_root() / "LICENSE"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "Apache License" not in text:
        raise WorkError("this package was installed without its LICENSE", fix="install it again")
    return text


def _measure(
    folder: Path, ingredients: _Ingredients, megatron_path: PathLike, min_acceptance: float
) -> _Measured:
    """Compare the exported model's logits with the checkpoint's, and run the model's checks."""
    logits = verify(megatron_path, folder)
    heads = [head for head in (logits.main, logits.mtp) if head is not None]
    value = f"largest relative error {max(head.relative_error for head in heads):.2e}"
    if logits.ok:
        outcome = Check.passed(LOGITS, value)
    else:
        departing = logits.first_departing
        if departing is not None:
            value += f", departing at {departing.name}"
        failure = InputError(
            value,
            rule=f"transformers computes what Megatron computes, within {logits.tolerance:g}",
            fix="run mellum2 verify",
        )
        outcome = Check.failed(LOGITS, failure)
    checks = model_checks(folder, text=ingredients.text, min_acceptance=min_acceptance)
    return _Measured(logits=logits, checks=(*checks, outcome))


def _write_cards(folder: Path, ingredients: _Ingredients, measured: _Measured, dtype: str) -> None:
    """Write verification.json and README.md."""
    checkpoint = ingredients.checkpoint
    verification: dict[str, Any] = {
        "member": ingredients.member,
        "software": {name: importlib.metadata.version(name) for name in _SOFTWARE},
        "checkpoint": {
            "name": checkpoint.iteration_dir.name,
            "iteration": checkpoint.iteration,
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
        member=ingredients.member,
        architecture=checkpoint.architecture,
        run=ingredients.run,
        iteration=checkpoint.iteration,
        dtype=dtype,
        evaluation=ingredients.evaluation,
        logits=measured.logits,
        # The card states the logits' errors in rows of their own.
        measured=[
            (check.name, f"{check.status}: {check.value}")
            for check in measured.checks
            if check.status != "not applicable" and check.name != LOGITS
        ],
        code=source_code(),
        trained_with=recorded_code(checkpoint.root),
    )
    write_text(folder / CARD_FILE, model_card(facts))


def _require_ok(report: ReleaseReport) -> None:
    """Raise WorkError with all failures, if there are any."""
    if report.ok:
        return
    failures = "; ".join(
        f"{check.name}: {check.value} ({check.rule}; fix: {check.fix})" for check in report.failures
    )
    raise WorkError(
        f"{report.folder} is not fit to publish. {failures}",
        fix="repair what it names and release again; nothing was written "
        "(--no-check writes the folder as it is)",
    )
