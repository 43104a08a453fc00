"""`mellum2 quickstart`: from source code to a Hugging Face model on a CPU.

Each step is a command of mellum2 and is printed as such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.steps import Steps
from mellum2_megatron.checkpoint import read_run
from mellum2_megatron.checkpoint.folder import RUN_FILE
from mellum2_megatron.common.console import console
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.prepared_folder import CORPUS_FILE
from mellum2_megatron.metrics import plot_loss, read_metrics
from mellum2_megatron.metrics.log import METRICS_FILE, series

if TYPE_CHECKING:
    from torch import Tensor

    from mellum2_megatron.config import Run

RECIPE = "mellum2_tiny_pretrain"
PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 64
TEMPERATURE = 0.6
"""Temperature of the text that is shown: a small model's likeliest tokens end in a loop."""

ACCEPTANCE_SEQUENCES = 16
"""Number of validation sequences for the MTP head's acceptance rate."""


@dataclass
class Quickstart:
    """One walk from source code to a Hugging Face model.

    Attributes:
        output: run folder; the Hugging Face folder is `output/hf`.
        data: folder of the prepared data, made if absent.
        overrides: `key=value` words for the training recipe, default none.
        max_megabytes: size of the corpus in MB, default 16.
        steps: the steps that ran.
    """

    output: Path
    data: Path
    overrides: Sequence[str] = ()
    max_megabytes: float = 16.0
    steps: Steps = field(default_factory=Steps)

    @property
    def hf(self) -> Path:
        """The exported folder."""
        return self.output / "hf"

    def run(self) -> dict[str, Any]:
        """Take all steps; return the summary, also written to `output/summary.json`."""
        # `data prepare` moves a finished folder into place: an existing one is complete.
        if (self.data / CORPUS_FILE).exists():
            self.steps.announce("prepare", f"data: {self.data} is there already")
        else:
            self.steps.run(
                "prepare",
                "the Python sources here: filters, duplicates, FIM, packs",
                *("data", "prepare", "--output", str(self.data)),
                *("--max-megabytes", f"{self.max_megabytes:g}"),
            )
        self.steps.run(
            "train",
            "train mellum2-tiny: two gloo ranks, experts divided between them, "
            "Muon, MTP, sliding windows",
            *("train", RECIPE, "--device", "cpu", "--nproc", "2"),
            *("--output", str(self.output), f"data.path={self.data}", *self.overrides),
        )
        self.steps.run(
            "export",
            "export to a Hugging Face folder in the released layout",
            *("convert", "export", "--megatron-path", str(self.output)),
            *("--hf-path", str(self.hf), "--overwrite"),
        )
        parity = self._verify()
        texts = self._generate()
        summary = self._summarize(parity, texts)
        plot_loss(
            self.output / METRICS_FILE,
            self.output / "loss.png",
            unigram_entropy=summary["valid_unigram_entropy"],
            ln_vocab=summary["ln_vocab"],
            title=str(self.output),
            recipe=RECIPE,
        )
        write_json(self.output / "summary.json", summary)
        first, last = summary["first_validation_loss"], summary["last_validation_loss"]
        console.print(
            f"\n[bold]Done.[/] validation loss {first:.3f} -> [bold]{last:.3f}[/] nats a token "
            f"(uniform guessing {summary['ln_vocab']:.3f}, "
            f"unigram entropy {summary['valid_unigram_entropy']:.3f}); "
            f"MTP acceptance {summary['mtp_acceptance']:.0%}\n"
            f"{self._corpus_report()}"
            f"{self.output}/: loss.png, metrics.jsonl, summary.json, checkpoints; "
            f"{self.hf}/ for transformers",
            highlight=False,
            soft_wrap=True,
        )
        return summary

    def _corpus_report(self) -> str:
        """Return a line with the page about the corpus; none for a folder without one."""
        page = self.data / "report" / "report.md"
        return f"{page}: what the corpus holds, tables and pictures\n" if page.exists() else ""

    # The last two steps run in this process, for the summary needs their figures.

    def _verify(self) -> dict[str, Any]:
        from conversion.verification.verify import verify

        self.steps.announce(
            "verify",
            "compare Megatron's logits with transformers'",
            *("verify", "--megatron-path", str(self.output), "--hf-path", str(self.hf)),
        )
        start = time.monotonic()
        report = verify(self.output, self.hf)
        self.steps.seconds["verify"] = time.monotonic() - start
        console.print(report.table())
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

        self.steps.announce(
            "generate",
            "text from transformers; greedy text is the same with and without the MTP head",
            *("generate", "--hf-path", str(self.hf), "--prompt", PROMPT, "--use-mtp"),
            # Shown is sampled text; greedy text is compared.
            *("--temperature", f"{TEMPERATURE:g}"),
        )
        start = time.monotonic()
        plain = generate(self.hf, PROMPT, max_new_tokens=NEW_TOKENS)
        drafted = generate(self.hf, PROMPT, use_mtp=True, max_new_tokens=NEW_TOKENS)
        sampled = generate(
            self.hf, PROMPT, use_mtp=True, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE
        )
        self.steps.seconds["generate"] = time.monotonic() - start
        console.print(sampled.text, markup=False, highlight=False, style="cyan")
        # The MTP head only drafts: the model accepts or replaces each token.
        if drafted.token_ids != plain.token_ids:
            raise WorkError(
                "greedy text with and without the MTP head differs",
                fix="compare `mellum2 generate` with and without",
            )
        return {
            "text": plain.text,
            "sampled_text": sampled.text,
            "same_with_mtp": True,
            "mtp_generation_acceptance": drafted.acceptance_rate,
        }

    def _summarize(self, parity: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        from conversion.huggingface.generation import mtp_acceptance

        run = read_run(self.output / RUN_FILE)
        entropy = load_json(self.data / CORPUS_FILE)["valid_unigram_entropy_nats"]
        steps, losses = series(read_metrics(self.output / METRICS_FILE), "lm_loss", "valid")
        if not losses:
            raise WorkError(
                "no validation in metrics.jsonl",
                fix="set logging.eval_interval below the number of steps",
            )
        tokens = self._validation_tokens(run)
        return {
            "vocab_size": run.architecture.vocab_size,
            "ln_vocab": math.log(run.architecture.vocab_size),
            "valid_unigram_entropy": entropy,
            "first_validation_loss": losses[0],
            "first_validation_step": steps[0],
            "last_validation_loss": losses[-1],
            "last_validation_step": steps[-1],
            "trained_tokens": run.train_tokens,
            "mtp_acceptance": mtp_acceptance(self.hf, tokens),
            "parity": parity,
            "generation": texts,
            "seconds": self.steps.rounded(),
        }

    def _validation_tokens(self, run: Run) -> Tensor:
        """Return up to `ACCEPTANCE_SEQUENCES` sequences of the validation data, [n, length]."""
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from mellum2_megatron.data.feed.sources import check_data

        length = run.data.sequence_length
        dataset = IndexedDataset(str(check_data(run).valid[0].prefix))
        wanted, stream = ACCEPTANCE_SEQUENCES * length, []
        for index in range(len(dataset)):
            stream += dataset[index].tolist()
            if len(stream) >= wanted:
                break
        rows = min(ACCEPTANCE_SEQUENCES, len(stream) // length)
        return torch.tensor(stream[: rows * length]).view(rows, length)


def run_quickstart(
    *, output: Path, data: Path, overrides: Sequence[str], max_megabytes: float
) -> None:
    """Take all steps of the quickstart; the arguments are the attributes of `Quickstart`."""
    Quickstart(output, data, overrides, max_megabytes).run()
