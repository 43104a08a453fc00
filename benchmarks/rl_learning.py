"""Does reinforcement learning teach a task, and not only a form? On one core, over several seeds.

    taskset -c 1 python benchmarks/rl_learning.py digits --output out/rl_digits
    taskset -c 1 python benchmarks/rl_learning.py code --output out/rl_code --seeds 3

A small Mellum 2 is fine-tuned on answers whose form is right and whose content is guessed, so that
it starts at the rate of a guess. Then `mellum2 rl` trains it, once for each seed. A part of the
prompts is held out from both and is the validation. Written are ``curves.png``, ``results.json``
and a table: reward of the held-out prompts before and after, and the 95% interval of the mean gain
over the seeds (Student's t of the paired differences).

- ``digits``: three digits are given, and the largest is wanted. A guess is one of the three.
- ``code``: words such as "times 17" are given, and a Python function of x is wanted. It runs in the
  sandbox, and its values are compared with those of the words. Of three guesses one is right, and
  two have the operator of another word: the fine-tuned model's likeliest answer is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import operator
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from mellum2_megatron.common.files import write_json
from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics

STUDENT_95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
"""Two-sided 95% quantile of Student's t, by number of values."""

MODEL = [
    "architecture.vocab_size=320",
    "architecture.hidden_size=64",
    "architecture.head_dim=16",
    "architecture.moe_intermediate_size=64",
    "architecture.num_experts=4",
    "architecture.num_experts_per_tok=2",
    "layout.ep=1",
    "logging.log_interval=1",
]


class Question(Protocol):
    """A kind of tasks.

    Attributes:
        held_out: prompts of the validation.
        eval_answers: answers to each of them.
        max_tokens, length: tokens of the longest answer, and with its prompt.
        chats: conversations of the fine-tuning for each prompt, each with a guess of its own.
        sft_steps: steps of the fine-tuning, 8 packs of 128 tokens each.
        vocab_size: tokens of the tokenizer.
    """

    held_out: int
    eval_answers: int
    max_tokens: int
    length: int
    chats: int
    sft_steps: int
    vocab_size: int

    @abstractmethod
    def prompts(self) -> list[str]:
        """Return all prompts."""

    @abstractmethod
    def guesses(self, prompt: str) -> list[str]:
        """Return all guesses, each as likely as the others."""

    @abstractmethod
    def is_right(self, prompt: str, answer: str) -> bool:
        """Return true for a guess that is right."""

    @abstractmethod
    def task(self, prompt: str) -> dict[str, object]:
        """Return verifier and arguments."""


class Digits(Question):
    """The largest of three digits."""

    held_out, eval_answers, max_tokens, length, chats = 200, 4, 3, 48, 12
    sft_steps, vocab_size = 300, 268

    def prompts(self) -> list[str]:
        return [" ".join(three) for three in itertools.product("0123456789", repeat=3)]

    def guesses(self, prompt: str) -> list[str]:
        return prompt.split()

    def is_right(self, prompt: str, answer: str) -> bool:
        return answer == max(prompt.split())

    def task(self, prompt: str) -> dict[str, object]:
        pattern = rf"\A\s*{max(prompt.split())}\s*\Z"
        return {"verifier": "form", "arguments": {"pattern": pattern}}


class Code(Question):
    """A function such as that of "plus 17"."""

    held_out, eval_answers, max_tokens, length, chats = 60, 2, 20, 48, 12
    sft_steps, vocab_size = 200, 290

    words = MappingProxyType(
        {
            "plus": ("+", operator.add),
            "minus": ("-", operator.sub),
            "times": ("*", operator.mul),
            "modulo": ("%", operator.mod),
        }
    )
    arguments = (3, 50, 237)

    def prompts(self) -> list[str]:
        return [f"{word} {number}" for word in self.words for number in range(10, 100)]

    def guesses(self, prompt: str) -> list[str]:
        word, number = prompt.split()
        signs = [sign for sign, _ in self.words.values()]
        place = list(self.words).index(word)
        right, other = signs[place], signs[(place + 1) % len(signs)]
        return [f"def f(x):\n    return x {sign} {number}" for sign in (right, other, other)]

    def values(self, prompt: str) -> list[int]:
        """Return the values that a right function has at `arguments`."""
        word, number = prompt.split()
        return [self.words[word][1](x, int(number)) for x in self.arguments]

    def is_right(self, prompt: str, answer: str) -> bool:
        expression = answer.rpartition("return ")[2]
        return [eval(expression, {"x": x}) for x in self.arguments] == self.values(prompt)

    def task(self, prompt: str) -> dict[str, object]:
        tests = [
            {"call": f"f({x})", "equals": str(value)}
            for x, value in zip(self.arguments, self.values(prompt), strict=True)
        ]
        return {"verifier": "code", "arguments": {"tests": tests, "seconds": 5}}


QUESTIONS: dict[str, Question] = {"digits": Digits(), "code": Code()}


def split(question: Question) -> tuple[list[str], list[str]]:
    """Return prompts of the training and those that are held out."""
    prompts = question.prompts()
    random.Random(0).shuffle(prompts)
    return prompts[question.held_out :], prompts[: question.held_out]


def guess_rate(question: Question, prompts: Sequence[str]) -> float:
    """Return the mean reward of guesses."""
    return statistics.fmean(
        question.is_right(prompt, guess) for prompt in prompts for guess in question.guesses(prompt)
    )


def write_lines(file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mellum2(*words: str) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, "-m", "mellum2_megatron", *words], check=True)


def prepare(question: Question, root: Path) -> None:
    """Write tasks, conversations and tokenizer, and fine-tune the model that starts all seeds."""
    from mellum2_megatron.data.tokens.tokenizer import train_tokenizer

    train, held_out = split(question)
    for name, prompts in (("train", train), ("valid", held_out)):
        rows = [
            {"messages": [{"role": "user", "content": prompt}], **question.task(prompt)}
            for prompt in prompts
        ]
        write_lines(root / "tasks" / f"{name}.jsonl", rows)
    rng = random.Random(1)
    pairs = [
        (prompt, rng.choice(question.guesses(prompt)))
        for prompt in train
        for _ in range(question.chats)
    ]
    rng.shuffle(pairs)
    chats: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": guess},
            ]
        }
        for prompt, guess in pairs
    ]
    write_lines(root / "chats.jsonl", chats)
    texts = [text for pair in pairs for text in pair]
    train_tokenizer(texts, root / "tokenizer", vocab_size=question.vocab_size)
    mellum2(
        *("data", "chat", str(root / "chats.jsonl"), "--output", str(root / "packs")),
        *("--tokenizer", str(root / "tokenizer"), "--mode", "instruct", "--length", "128"),
    )
    mellum2(
        *("train", "mellum2_tiny_sft_instruct", *MODEL, f"data.path={root / 'packs'}"),
        *("data.sequence_length=128", "layout.cp=1", "checkpoint.load=null"),
        *(f"schedule.train_samples={8 * question.sft_steps}", "schedule.warmup_samples=80"),
        *("schedule.micro_batch_size=8", "optimizer.lr=3e-3", "logging.log_interval=20"),
        *("checkpoint.save_interval=10000", "logging.eval_interval=100"),
        *("--output", str(root / "sft"), "--device", "cpu", "--nproc", "1"),
    )


def learn(question: Question, root: Path, seed: int, steps: int, more: Sequence[str] = ()) -> None:
    """Train from the fine-tuned model with a seed."""
    objective = [
        "rl.objective.prompts=8",
        "rl.objective.group_size=8",
        f"rl.objective.max_tokens={question.max_tokens}",
        "rl.objective.overlong_tokens=1",
        "rl.objective.overlong_penalty=0",
        "rl.objective.max_age=0",
    ]
    mellum2(
        *("rl", "mellum2_tiny_rlvr_instruct", *MODEL, *objective, f"seed={seed}"),
        *(f"data.path={root / 'tasks'}", f"data.tokenizer={root / 'tokenizer'}"),
        *(f"checkpoint.load={root / 'sft'}", f"data.sequence_length={question.length}"),
        *(f"rl.eval_answers={question.eval_answers}", "rl.workers=2"),
        *("schedule.batch_schedule=[[0,64]]", "schedule.micro_batch_size=64"),
        *(f"schedule.train_samples={64 * steps}", "schedule.warmup_samples=128"),
        *("optimizer.lr=1e-3", "optimizer.min_lr=1e-4"),
        *("logging.eval_interval=10", "checkpoint.save_interval=10000", *more),
        *("--output", str(root / f"seed_{seed}"), "--device", "cpu", "--nproc", "1"),
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half of the 95% interval of the mean."""
    half = STUDENT_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half


def report(question: Question, root: Path, seconds: dict[int, tuple[float, float]]) -> None:
    """Write curves, results and table."""
    import matplotlib.pyplot as plt

    guess = guess_rate(question, split(question)[1])
    figure, axes = plt.subplots(figsize=(7, 4))
    starts, ends = [], []
    for seed in seconds:
        records = read_metrics(root / f"seed_{seed}" / METRICS_FILE)
        curve = {one.step: one.values["rl/reward"] for one in records if one.kind == "valid"}
        axes.plot(list(curve), list(curve.values()), marker=".", label=f"seed {seed}")
        starts.append(curve[min(curve)])
        ends.append(curve[max(curve)])
    axes.axhline(guess, color="grey", linestyle=":", label="guess")
    axes.set_xlabel("step")
    axes.set_ylabel(f"reward of {question.held_out} held-out prompts")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(root / "curves.png", dpi=110)
    gains = [end - start for start, end in zip(starts, ends, strict=True)]
    gain, half = interval(gains)
    results = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": sys.argv,
        "load_average": os.getloadavg(),
        "guess": guess,
        "start": starts,
        "end": ends,
        "gain": gain,
        "gain_interval": [gain - half, gain + half],
        "wall_seconds": [wall for wall, _ in seconds.values()],
        "cpu_seconds": [cpu for _, cpu in seconds.values()],
    }
    write_json(root / "results.json", results)
    lines = [
        "| seed | before | after | gain | minutes | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (seed, (wall, cpu)), start, end in zip(seconds.items(), starts, ends, strict=True):
        rewards = f"{start:.3f} | {end:.3f} | {end - start:.3f}"
        lines.append(f"| {seed} | {rewards} | {wall / 60:.1f} | {cpu:.0f} |")
    lines += [
        f"| mean | {statistics.fmean(starts):.3f} | {statistics.fmean(ends):.3f} | "
        f"{gain:.3f} +- {half:.3f} | | |",
        "",
        f"A guess: {guess:.3f}. Gain, lower bound of the 95% interval: {gain - half:.3f}.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Prepare once, train each seed, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        choices=sorted(STUDENT_95),
        metavar="N",
        help="runs, 2 to 10 (one alone has no interval); default 5",
    )
    parser.add_argument("--first-seed", type=int, default=1, help="default 1")
    parser.add_argument("--steps", type=int, default=40, help="default 40")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the RL runs")
    options = parser.parse_args()
    question, root = QUESTIONS[options.question], options.output.resolve()
    if not (root / "sft" / "latest_checkpointed_iteration.txt").is_file():
        prepare(question, root)
    seconds = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        learn(question, root, seed, options.steps, options.set)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds[seed] = (time.monotonic() - begin, cpu)
    report(question, root, seconds)


if __name__ == "__main__":
    main()
