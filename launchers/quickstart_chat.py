"""`mellum2 quickstart --chat`: from the quickstart's base to a chat model, on a CPU.

Long context (report §4), then supervised fine-tuning (§5.1) on questions about functions of
Python's standard library, whose answers can be checked. Held-out questions are asked before and
after.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.quickstart import Quickstart
from launchers.steps import Steps
from mellum2_megatron.checkpoint.folder import TOKENIZER_FOLDER
from mellum2_megatron.common.console import console, plain_table
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.common.json_files import load_json
from mellum2_megatron.data.prepared_folder import CORPUS_FILE
from mellum2_megatron.data.tokens.pack_files import PACKS_FILE
from mellum2_megatron.recipes.tiny import LONG_LENGTH, SFT_LENGTH

LONG_RECIPE = "mellum2_tiny_long_context"
SFT_RECIPE = "mellum2_tiny_sft_instruct"
SUMMARY_FILE = "summary.json"

QUESTION = '''```python
def area(width, height):
    """Return the area of a rectangle."""
    return width * height
```
What is this function called?'''
"""Question to the released model; the function is in no conversation."""


@dataclass
class ChatQuickstart:
    """One walk from a base model to a chat model.

    Attributes:
        base: run folder of the quickstart; its steps are taken first if it has no summary.
        data: folder of the data prepared for the base; read only where the base is made.
        output: folder for all results: ``long_data``, ``conversations``, ``long_context``, ``sft``
            and the released folder ``release``.
        overrides: `key=value` words for the base's recipe, default none.
        long_overrides, sft_overrides: words for the two other recipes, default none.
        max_megabytes: size of the corpus in MB, default 16.
        conversations: number of conversations, default 2000.
        steps: the steps that ran.
    """

    base: Path
    data: Path
    output: Path
    overrides: Sequence[str] = ()
    long_overrides: Sequence[str] = ()
    sft_overrides: Sequence[str] = ()
    max_megabytes: float = 16.0
    conversations: int = 2000
    steps: Steps = field(default_factory=Steps)

    def run(self) -> dict[str, Any]:
        """Take all steps; return the summary, also written to `output/summary.json`.

        A step whose folder is complete is left out; a training goes on where it was stopped.

        Raises:
            InputError: overrides for a base that is there already; or a step was refused.
            WorkError: a step failed.
        """
        self._base()
        self._long_context()
        conversations = self._conversations()
        before = self._measure("before", self.output / "long_context", conversations)
        self.steps.run(
            "sft",
            "supervised fine-tuning: the turns of the assistant are learnt",
            *("train", SFT_RECIPE, "--device", "cpu", "--nproc", "2"),
            *("--output", str(self.output / "sft"), f"data.path={conversations}"),
            *(f"checkpoint.load={self.output / 'long_context'}", *self.sft_overrides),
        )
        after = self._measure("after", self.output / "sft", conversations)
        release = self.output / "release"
        self.steps.run(
            "release",
            "weights, tokenizer, chat template and model card, all checked",
            *("release", "--megatron-path", str(self.output / "sft")),
            *("--member", "instruct-sft", "--output", str(release), "--overwrite"),
        )
        answer = self._ask(release)
        summary = {
            "before": before,
            "after": after,
            "question": QUESTION,
            "answer": answer,
            "seconds": self.steps.rounded(),
        }
        write_json(self.output / SUMMARY_FILE, summary)
        _print_table(before, after)
        console.print(
            f"\n[bold]Done.[/] {self.output}/: {SUMMARY_FILE}, sft/loss.png; {release}/ for "
            "transformers, vLLM and `mellum2 serve`",
            highlight=False,
            soft_wrap=True,
        )
        return summary

    def _base(self) -> None:
        """Take the quickstart's steps, unless its run is complete."""
        if not (self.base / SUMMARY_FILE).exists():
            Quickstart(self.base, self.data, self.overrides, self.max_megabytes, self.steps).run()
            return
        if self.overrides:
            raise InputError(
                " ".join(self.overrides),
                rule=f"{self.base} has been trained already",
                fix="leave the words out, or give another --output",
            )
        self.steps.announce("base", f"{self.base} is there already")

    def _long_context(self) -> None:
        """Make the long packs and train on them."""
        data = self.output / "long_data"
        # Data commands move a finished folder into place: an existing one is complete.
        if (data / CORPUS_FILE).exists():
            self.steps.announce("long data", f"{data} is there already")
        else:
            self.steps.run(
                "long data",
                f"the same sources in packs of {LONG_LENGTH:,} tokens",
                *("data", "prepare", "--output", str(data)),
                *("--max-megabytes", f"{self.max_megabytes:g}"),
                *("--tokenizer", str(self.base / TOKENIZER_FOLDER)),
                *("--sequence-length", str(LONG_LENGTH), "--align", "4"),
            )
        self.steps.run(
            "long context",
            "layer-selective YaRN, sixteen times the length; two context-parallel ranks",
            *("train", LONG_RECIPE, "--device", "cpu", "--nproc", "2"),
            *("--output", str(self.output / "long_context"), f"data.path={data}"),
            *(f"checkpoint.load={self.base}", *self.long_overrides),
        )

    def _conversations(self) -> Path:
        """Return the folder of packed conversations, made if it is not there."""
        folder = self.output / "conversations"
        if (folder / PACKS_FILE).exists():
            self.steps.announce("conversations", f"{folder} is there already")
            return folder
        questions = self.output / "questions.jsonl"
        self.steps.run(
            "questions",
            "conversations about functions of Python's standard library",
            *("data", "code-questions", "--output", str(questions)),
            *("--functions", str(self.conversations)),
        )
        self.steps.run(
            "conversations",
            "packs with loss masks",
            *("data", "chat", str(questions), "--tokenizer", str(self.base)),
            *("--mode", "instruct", "--length", str(SFT_LENGTH), "--output", str(folder)),
        )
        return folder

    def _measure(self, name: str, run: Path, conversations: Path) -> dict[str, Any]:
        """Ask the held-out questions; return the figures by name."""
        file = self.output / f"answers_{name}.json"
        self.steps.run(
            name,
            "answers to held-out conversations",
            *("eval", str(run), "--suite", "chat_answers", "--out", str(file)),
            f"chat_answers.data={conversations}",
        )
        (measure,) = load_json(file)["measures"]
        return {
            figure["name"]: {key: figure[key] for key in ("value", "low", "high", "items", "unit")}
            for figure in measure["figures"]
        }

    def _ask(self, release: Path) -> str:
        """Ask the released model a question, with its chat template in transformers."""
        from transformers import AutoTokenizer

        from conversion.huggingface.generation import generate, quiet_transformers

        self.steps.announce("ask", "a question to the released model, in transformers")
        start = time.monotonic()
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(release), local_files_only=True)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
        )
        answer = generate(release, prompt, max_new_tokens=32).completion
        self.steps.seconds["ask"] = time.monotonic() - start
        console.print(f"{QUESTION}\n> {answer}", markup=False, highlight=False, style="cyan")
        return answer


def _print_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Print the figures of both models, each with its 95% interval."""
    table = plain_table("held-out answers", "before", "after", title="fine-tuning")
    for name, figure in before.items():
        cells = [
            f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            for one in (figure, after[name])
        ]
        table.add_row(f"{name}, {figure['unit']}", *cells)
    console.print(table)


def run_chat_quickstart(
    *, base: Path, data: Path, overrides: Sequence[str], max_megabytes: float
) -> None:
    """Take all steps from the base, or from the text if there is no base.

    Raises:
        InputError: see `ChatQuickstart.run`.
    """
    output = base.with_name(f"{base.name}_chat")
    ChatQuickstart(base, data, output, overrides, max_megabytes=max_megabytes).run()
