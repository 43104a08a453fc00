"""`mellum2 quickstart`: the whole way on a CPU, each step the command that a user would type."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.common.files import write_json

PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 64
ACCEPTANCE_SEQUENCES = 16
"""Validation sequences on which the MTP head's acceptance is measured."""

_SECONDS_TO_END = 40.0  # torch's agent kills ranks that do not end within 30


@dataclass
class Quickstart:
    """One walk from source code to a Hugging Face model.

    Attributes:
        console: where the steps are announced.
        output: folder of the run; the Hugging Face folder is `output/hf`.
        data: folder of the prepared data; made if it is not there.
        overrides: `key=value` words for the training recipe.
        max_megabytes: size of the corpus.
        seconds: time of each step that ran.
    """

    console: Console
    output: Path
    data: Path
    overrides: Sequence[str] = ()
    max_megabytes: float = 16.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def hf(self) -> Path:
        """The exported folder."""
        return self.output / "hf"

    def run(self) -> dict[str, Any]:
        """Walk all steps and return the summary, which is also written to `output/summary.json`."""
        self._prepare()
        self._step(
            "train",
            "train mellum2-tiny: two gloo ranks, experts divided between them, Muon, MTP, sliding windows",
            [
                "train",
                "mellum2_tiny_pretrain",
                "--device",
                "cpu",
                "--nproc",
                "2",
                "--output",
                str(self.output),
            ],
            [f"data.path={self.data}", *self.overrides],
        )
        export = [
            "convert",
            "export",
            "--megatron-path",
            str(self.output),
            "--hf-path",
            str(self.hf),
            "--overwrite",
        ]
        self._step("export", "export to a Hugging Face folder in the released layout", export)
        parity = self._verify()
        texts = self._generate()
        summary = self._summarize(parity, texts)
        self._plot(summary)
        write_json(self.output / "summary.json", summary)
        self._report(summary)
        return summary

    def _prepare(self) -> None:
        if (self.data / "corpus.json").exists():
            self._announce("prepare", f"data: {self.data} is there already")
            return
        words = [
            "data",
            "prepare",
            "--output",
            str(self.data),
            "--max-megabytes",
            f"{self.max_megabytes:g}",
        ]
        self._step(
            "prepare", "make a corpus of the Python sources on this machine, and tokenize it", words
        )

    def _verify(self) -> dict[str, Any]:
        from conversion.verification.verify import verify

        words = ["verify", "--megatron-path", str(self.output), "--hf-path", str(self.hf)]
        self._announce("verify", "compare Megatron's logits with transformers'", words)
        start = time.monotonic()
        report = verify(self.output, self.hf)
        self.seconds["verify"] = time.monotonic() - start
        self.console.print(report.table())
        if not report.ok:
            raise WorkError(
                "Megatron's and transformers' logits differ",
                fix="see the table above; please report it",
            )
        heads = {"main": report.main, "mtp": report.mtp}
        return {
            name: {
                "max_error": head.max_error,
                "mean_error": head.mean_error,
                "relative_error": head.relative_error,
            }
            for name, head in heads.items()
            if head is not None
        }

    def _generate(self) -> dict[str, Any]:
        from conversion.huggingface.generation import generate

        words = ["generate", "--hf-path", str(self.hf), "--prompt", PROMPT, "--use-mtp"]
        self._announce(
            "generate", "continue a text in transformers, without and with the MTP head", words
        )
        start = time.monotonic()
        plain = generate(self.hf, PROMPT, max_new_tokens=NEW_TOKENS)
        drafted = generate(self.hf, PROMPT, use_mtp=True, max_new_tokens=NEW_TOKENS)
        self.seconds["generate"] = time.monotonic() - start
        self.console.print(plain.text, markup=False, highlight=False, style="cyan")
        if drafted.token_ids != plain.token_ids:
            raise WorkError(
                "greedy text with and without the MTP head differs",
                fix="compare `mellum2 generate` with and without",
            )
        return {
            "text": plain.text,
            "same_with_mtp": True,
            "mtp_generation_acceptance": drafted.acceptance_rate,
        }

    def _summarize(self, parity: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        from conversion.huggingface.generation import mtp_acceptance
        from mellum2_megatron.checkpoint import read_run
        from mellum2_megatron.checkpoint.folder import RUN_FILE
        from mellum2_megatron.data.prepared_folder import load_prepared
        from mellum2_megatron.metrics import read_metrics
        from mellum2_megatron.metrics.log import METRICS_FILE, series

        run = read_run(self.output / RUN_FILE)
        prepared = load_prepared(self.data)
        steps, losses = series(read_metrics(self.output / METRICS_FILE), "lm_loss", "valid")
        if not losses:
            raise WorkError(
                "no validation in metrics.jsonl",
                fix="set logging.eval_interval below the number of steps",
            )
        tokens = self._validation_tokens(run.data.sequence_length)
        return {
            "vocab_size": run.architecture.vocab_size,
            "ln_vocab": math.log(run.architecture.vocab_size),
            "valid_unigram_entropy": prepared.valid_unigram_entropy_nats,
            "first_validation_loss": losses[0],
            "first_validation_step": steps[0],
            "last_validation_loss": losses[-1],
            "last_validation_step": steps[-1],
            "trained_tokens": run.train_tokens,
            "mtp_acceptance": mtp_acceptance(self.hf, tokens),
            "parity": parity,
            "generation": texts,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }

    def _validation_tokens(self, length: int) -> Any:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(self.data / "valid_document"))
        wanted, stream = ACCEPTANCE_SEQUENCES * length, []
        for index in range(len(dataset)):
            stream += dataset[index].tolist()
            if len(stream) >= wanted:
                break
        rows = min(ACCEPTANCE_SEQUENCES, len(stream) // length)
        return torch.tensor(stream[: rows * length]).view(rows, length)

    def _plot(self, summary: dict[str, Any]) -> None:
        from mellum2_megatron.metrics import plot_loss
        from mellum2_megatron.metrics.log import METRICS_FILE

        plot_loss(
            self.output / METRICS_FILE,
            self.output / "loss.png",
            unigram_entropy=summary["valid_unigram_entropy"],
            ln_vocab=summary["ln_vocab"],
        )

    def _report(self, summary: dict[str, Any]) -> None:
        first, last = summary["first_validation_loss"], summary["last_validation_loss"]
        self.console.print(
            f"\n[bold]Done.[/] validation loss {first:.3f} -> [bold]{last:.3f}[/] nats a token "
            f"(uniform guessing {summary['ln_vocab']:.3f}, unigram entropy {summary['valid_unigram_entropy']:.3f}); "
            f"MTP acceptance {summary['mtp_acceptance']:.0%}\n"
            f"{self.output}/: loss.png, metrics.jsonl, summary.json, checkpoints; {self.hf}/ for transformers",
            highlight=False,
            soft_wrap=True,
        )

    def _step(self, name: str, what: str, words: Sequence[str], more: Sequence[str] = ()) -> None:
        command = [*words, *more]
        self._announce(name, what, command)
        start = time.monotonic()
        code = _call([sys.executable, "-m", "mellum2_megatron", *command])
        self.seconds[name] = time.monotonic() - start
        if code == 130:
            raise KeyboardInterrupt
        if code == 2:  # the step has said what is wrong
            raise InputError(
                f"step {name}", rule="was refused (see above)", fix="follow its message"
            )
        if code:
            raise WorkError(
                f"step {name} failed with exit code {code} (see above)", fix="follow its message"
            )

    def _announce(self, name: str, what: str, words: Sequence[str] = ()) -> None:
        self.console.rule(f"[bold]{name}[/]: {what}", align="left")
        if words:
            self.console.print(
                f"$ mellum2 {shlex.join(words)}", style="dim", soft_wrap=True, highlight=False
            )


def _call(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code.

    An interrupt from the keyboard reaches the command too: it is given the time to end its own
    processes.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise


def run_quickstart(
    console: Console, *, output: Path, data: Path, overrides: Sequence[str], max_megabytes: float
) -> None:
    """Walk the whole way; see `Quickstart`."""
    Quickstart(console, output, data, overrides, max_megabytes).run()
