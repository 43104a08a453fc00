"""Does reinforcement learning learn? The largest of three digits, on a CPU, over several seeds.

    python benchmarks/rl_digits.py --output out/rl_digits --seeds 5

A small Mellum 2 is fine-tuned to answer one of the three digits at random: it knows the form
and not the task. Then `mellum2 rl` trains it on 800 of the 1,000 prompts, with a seed of its own
each time; the other 200 are the validation, which no step sees. Written are `curves.png`,
`results.json` and a table: reward of the held-out prompts before and after, and the 95% interval
of the mean over the seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from mellum2_megatron.metrics.log import METRICS_FILE, read_metrics

STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Two-sided 95% quantile of Student's t, by number of values."""

HELD_OUT = 200
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


def conversation(digits: tuple[int, ...], answer: int | None = None) -> dict[str, object]:
    """Return a conversation about three digits, or a task if there is no answer."""
    messages = [{"role": "user", "content": " ".join(map(str, digits))}]
    if answer is not None:
        return {"messages": [*messages, {"role": "assistant", "content": str(answer)}]}
    pattern = rf"\A\s*{max(digits)}\s*\Z"
    return {"messages": messages, "verifier": "form", "arguments": {"pattern": pattern}}


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mellum2(*words: str) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, "-m", "mellum2_megatron", *words], check=True)


def prepare(root: Path) -> None:
    """Write tasks, conversations and tokenizer, and fine-tune the model that starts all seeds."""
    from mellum2_megatron.data.tokens.tokenizer import train_tokenizer

    rng = random.Random(0)
    prompts = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    rng.shuffle(prompts)
    valid, train = prompts[:HELD_OUT], prompts[HELD_OUT:]
    write_lines(root / "tasks" / "train.jsonl", [conversation(one) for one in train])
    write_lines(root / "tasks" / "valid.jsonl", [conversation(one) for one in valid])
    chats = [conversation(one, rng.choice(one)) for one in train for _ in range(4)]
    rng.shuffle(chats)
    write_lines(root / "chats.jsonl", chats)
    train_tokenizer([" ".join(map(str, one)) for one in train], root / "tokenizer", vocab_size=268)
    mellum2(
        *("data", "chat", str(root / "chats.jsonl"), "--output", str(root / "packs")),
        *("--tokenizer", str(root / "tokenizer"), "--mode", "instruct", "--length", "128"),
    )
    mellum2(
        *("train", "mellum2_tiny_sft_instruct", *MODEL, f"data.path={root / 'packs'}"),
        *("data.sequence_length=128", "layout.cp=1", "checkpoint.load=null"),
        *("schedule.train_samples=640", "schedule.warmup_samples=80", "optimizer.lr=3e-3"),
        *(
            "schedule.micro_batch_size=8",
            "checkpoint.save_interval=1000",
            "logging.eval_interval=60",
        ),
        *("--output", str(root / "sft"), "--device", "cpu", "--nproc", "1"),
    )


def learn(root: Path, seed: int, steps: int) -> float:
    """Train from the fine-tuned model with a seed; return the processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    mellum2(
        *("rl", "mellum2_tiny_rlvr_instruct", *MODEL, f"seed={seed}"),
        *(f"data.path={root / 'tasks'}", f"data.tokenizer={root / 'tokenizer'}"),
        *(f"checkpoint.load={root / 'sft'}", "data.sequence_length=48"),
        *("rl.objective.prompts=8", "rl.objective.group_size=8", "rl.objective.max_tokens=3"),
        *("rl.objective.overlong_tokens=1", "rl.objective.overlong_penalty=0"),
        *("rl.objective.max_age=0", "rl.eval_answers=1", "schedule.batch_schedule=[[0,64]]"),
        *(f"schedule.train_samples={64 * steps}", "schedule.warmup_samples=128"),
        *("schedule.micro_batch_size=64", "optimizer.lr=1e-3", "optimizer.min_lr=1e-4"),
        *("logging.eval_interval=10", "checkpoint.save_interval=1000"),
        *("--output", str(root / f"seed_{seed}"), "--device", "cpu", "--nproc", "1"),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(root: Path, seconds: dict[int, float]) -> None:
    """Write curves, results and table."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    ends, starts = [], []
    for seed in seconds:
        records = read_metrics(root / f"seed_{seed}" / METRICS_FILE)
        curve = {one.step: one.values["rl/reward"] for one in records if one.kind == "valid"}
        axes.plot(list(curve), list(curve.values()), marker=".", label=f"seed {seed}")
        starts.append(curve[min(curve)])
        ends.append(curve[max(curve)])
    axes.set_xlabel("step")
    axes.set_ylabel("reward of 200 held-out prompts")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(root / "curves.png", dpi=110)
    mean = statistics.fmean(ends)
    half = STUDENT_95[len(ends)] * statistics.stdev(ends) / len(ends) ** 0.5
    results = {
        "start": starts,
        "end": ends,
        "mean": mean,
        "interval": [mean - half, mean + half],
        "cpu_seconds": list(seconds.values()),
    }
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    lines = ["| seed | before | after | CPU seconds |", "|---|---|---|---|"]
    for seed, start, end in zip(seconds, starts, ends, strict=True):
        lines.append(f"| {seed} | {start:.3f} | {end:.3f} | {seconds[seed]:.0f} |")
    lines.append(f"| mean | {statistics.fmean(starts):.3f} | {mean:.3f} +- {half:.3f} | |")
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Prepare once, train each seed, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(STUDENT_95))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    root = options.output.resolve()
    if not (root / "sft" / "latest_checkpointed_iteration.txt").is_file():
        prepare(root)
    seconds = {seed: learn(root, seed, options.steps) for seed in range(1, options.seeds + 1)}
    report(root, seconds)


if __name__ == "__main__":
    main()
