"""Would a test notice? Break the code in known ways, one at a time, and run the test that should.

    python -m tests.mutations                 # all: about half an hour on two cores
    python -m tests.mutations labels mask     # those with a word of these in their name
    python -m tests.mutations --list

Each mutation is made in a temporary copy of the working tree, never in the tree itself. A mutation
is killed when its test fails, and the same test passes in the copy without it. The exit code is 1
if one survived. CI does not run this; `tests/test_mutations.py` holds the list to the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY

TESTS_FAILED = 1
"""pytest's exit code; 2 and above are errors of another kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """One fault, and the test that notices it.

    Attributes:
        name: the fault in a few words.
        file: file that is changed, relative to the repository.
        old: text that occurs exactly once in it.
        new: text that takes its place.
        test: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]


STEP, STEP_TEST = "mellum2_megatron/training/step.py", ("tests/training/test_step.py",)
ANSWERING, POOL = "ablations/answering/", "ablations/running/pool.py"
FEED, FEED_TEST = "mellum2_megatron/data/feed/", ("tests/data/test_datasets.py",)
ARGUMENTS = "mellum2_megatron/upstream/arguments.py"
NUMBERS_TEST = ("tests/config/test_numbers.py",)
ROTARY, ROTARY_TEST = "mellum2_megatron/model/rotary.py", ("tests/model/test_rotary.py",)
RULES, RULES_TEST = "mellum2_megatron/planning/settings_rules.py", ("tests/planning/test_rules.py",)
PREPARE, PREPARE_TEST = "mellum2_megatron/data/prepare.py", ("tests/data/test_prepare.py",)
OBJECTIVE, OBJECTIVE_TEST = (
    "mellum2_megatron/rlvr/objective.py",
    ("tests/rlvr/test_objective.py",),
)
PROVIDER_TEST = ("tests/training/test_dataset_provider.py",)

MUTATIONS = (
    Mutation(
        name="places of scored items are never free again",
        file="mellum2_megatron/rlvr/gateway.py",
        old="self._waiting -= 1",
        new="self._waiting -= 0",
        test=("tests/rlvr/test_gateway.py",),
    ),
    Mutation(
        name="a request may name any file as its verifier",
        file="mellum2_megatron/rlvr/gateway.py",
        old='name not in (*VERIFIERS, "all") and name not in self._own',
        new="not name",
        test=("tests/rlvr/test_gateway.py",),
    ),
    Mutation(
        name="a task may end with the answer",
        file="mellum2_megatron/data/chat/records.py",
        old='not in ("user", "tool")',
        new='not in ("user", "tool", "assistant")',
        test=("tests/rlvr/test_tasks.py",),
    ),
    Mutation(
        name="tasks like held-out items are taken",
        file="mellum2_megatron/rlvr/tasks.py",
        old="if similarity >= SIMILAR:",
        new="if similarity > 1:",
        test=("tests/rlvr/test_tasks.py",),
    ),
    Mutation(
        name="programs in the sandbox keep the network",
        file="mellum2_megatron/rlvr/rewards/sandbox.py",
        old='"--unshare-all", "--unshare-user"',
        new='"--unshare-all", "--share-net", "--unshare-user"',
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="the size of /tmp has no limit",
        file="mellum2_megatron/rlvr/rewards/sandbox.py",
        old='*("--size", disk, "--tmpfs", "/tmp"',
        new='*("--tmpfs", "/tmp"',
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="results said twice count",
        file="mellum2_megatron/rlvr/rewards/code_tests.py",
        old='"results twice" if len(values) > 1 else ""',
        new='""',
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="true is 1 in a tool call",
        file="mellum2_megatron/rlvr/rewards/verifiers.py",
        old=" and isinstance(one, bool) == isinstance(other, bool)",
        new="",
        test=("tests/rlvr/test_verifiers.py",),
    ),
    Mutation(
        name="an answer may stand in the thoughts",
        file="mellum2_megatron/rlvr/rewards/verdict.py",
        old="self.text.partition(END_THINK)[2]",
        new="self.text",
        test=("tests/rlvr/test_verifiers.py",),
    ),
    Mutation(
        name="the advantage's baseline holds the answer itself",
        file=OBJECTIVE,
        old="/ (group - 1)",
        new="/ group",
        test=OBJECTIVE_TEST,
    ),
    Mutation(
        name="tokens inside the band weigh 1",
        file=OBJECTIVE,
        old="weight_bt * loss_bt, zero)",
        new="loss_bt, zero)",
        test=OBJECTIVE_TEST,
    ),
    Mutation(
        name="tokens outside the band are learnt",
        file=OBJECTIVE,
        old="used_bt = counted_bt & inside_bt",
        new="used_bt = counted_bt",
        test=OBJECTIVE_TEST,
    ),
    Mutation(
        name="the band looks at the policy that learns",
        file=OBJECTIVE,
        old="torch.where(counted_bt, previous_bt - generation_bt, zero).exp()",
        new="torch.where(counted_bt, current_bt.detach() - generation_bt, zero).exp()",
        test=OBJECTIVE_TEST,
    ),
    Mutation(
        name="short wrong answers are rewarded",
        file=OBJECTIVE,
        old="thinking | (rewards <= 0)",
        new="thinking",
        test=OBJECTIVE_TEST,
    ),
    Mutation(
        name="a loss mask multiplies router losses",
        file="mellum2_megatron/model/router.py",
        old="            return self.counted_share\n",
        new="            return 1.0\n",
        test=("tests/layouts/test_layouts.py", "-k", "weight_of_router"),
    ),
    Mutation(
        name="learnt turns begin with a token of the prompt",
        file="mellum2_megatron/data/chat/samples.py",
        old="(begins < bounds[before, 1])",
        new="(begins > bounds[before, 1])",
        test=("tests/data/test_chat_masks.py", "-k", "blanks or prompt"),
    ),
    Mutation(
        name="a turn's end is not learnt",
        file="mellum2_megatron/data/chat/masks.py",
        old="    return begin, after.end()\n",
        new="    return begin, end\n",
        test=("tests/data/test_chat_masks.py", "-k", "other_chatml"),
    ),
    Mutation(
        name="router bias weighs the experts too",
        file="mellum2_megatron/model/router_variants.py",
        old="        return scores.gather(1, indices), indices",
        new="        return (scores + self._router.expert_bias).gather(1, indices), indices",
        test=("tests/model/test_router_variants.py", "-k", "weigh"),
    ),
    Mutation(
        name="dropped tokens counted without padding",
        file="mellum2_megatron/model/router_variants.py",
        old="            routing_map = routing_map & ~padding_mask[:, None]\n",
        new="",
        test=("tests/model/test_router_variants.py", "-k", "padding"),
    ),
    Mutation(
        name="MTP layer dense beside a sparse trunk",
        file="mellum2_megatron/architecture/mellum2.py",
        old='        return "sparse" if self.has_experts else "dense"',
        new='        return "dense" if "dense" in self.mlp_layer_types else "sparse"',
        test=("tests/model/test_parity.py", "-k", "dense_and_sparse"),
    ),
    Mutation(
        name="labels of the next token but one",
        file=STEP,
        old="    return {name: batch.get(name) for name in _FIELDS}\n",
        new='    if batch.get("labels") is not None:\n'
        '        batch["labels"] = batch["labels"].roll(-1, 1)\n'
        "    return {name: batch.get(name) for name in _FIELDS}\n",
        test=STEP_TEST,
    ),
    Mutation(
        name="labels of the next token but one, in packs",
        file=STEP,
        old="    return {name: batch[name] for name in _FIELDS}, packed\n",
        new='    if batch["labels"] is not None:\n'
        '        batch["labels"] = batch["labels"].roll(-1, 1)\n'
        "    return {name: batch[name] for name in _FIELDS}, packed\n",
        test=(*STEP_TEST, "-k", "packs"),
    ),
    Mutation(
        name="mask not passed to the model",
        file=STEP,
        old='        loss_mask=batch["loss_mask"],\n        packed_seq_params',
        new="        packed_seq_params",
        test=STEP_TEST,
    ),
    Mutation(
        name="mask not passed to the model, seen by the MTP loss",
        file=STEP,
        old='        loss_mask=batch["loss_mask"],\n        packed_seq_params',
        new="        packed_seq_params",
        test=("tests/layouts/test_layouts.py", "-k", "do_not_count"),
    ),
    Mutation(
        name="token 0 taken for padding",
        file=f"{FEED}sources.py",
        old="    pad: int = -1\n",
        new="    pad: int = 0\n",
        test=FEED_TEST,
    ),
    Mutation(
        name="validation set that never starts over",
        file=f"{FEED}fixed_validation.py",
        old="number = int(index) % self.period",
        new="number = int(index)",
        test=PROVIDER_TEST,
    ),
    Mutation(
        name="labels counted for the document before",
        file=f"{FEED}indexed_documents.py",
        old="np.cumsum([0, *lengths[:-1]], dtype=np.int64) - 1",
        new="np.cumsum([0, *lengths[:-1]], dtype=np.int64)",
        test=PROVIDER_TEST,
    ),
    Mutation(
        name="validation set not wrapped",
        file="mellum2_megatron/training/datasets.py",
        old="FixedValidation(valid_set, period=per_validation, length=samples[1])",
        new="valid_set",
        test=PROVIDER_TEST,
    ),
    Mutation(
        name="mtp_factor not passed on",
        file=ARGUMENTS,
        old='        words += ["--mtp-loss-scaling-factor", str(run.loss.mtp_factor)]',
        new="        pass",
        test=NUMBERS_TEST,
    ),
    Mutation(
        name="z_loss_coef mixed up",
        file=ARGUMENTS,
        old="str(run.loss.z_loss_coef)",
        new="str(run.loss.aux_loss_coef)",
        test=NUMBERS_TEST,
    ),
    Mutation(
        name="YaRN's beta_fast ignored",
        file=ROTARY,
        old="beta_fast=rope.beta_fast",
        new="beta_fast=32.0",
        test=ROTARY_TEST,
    ),
    Mutation(
        name="YaRN's beta_slow ignored",
        file=ROTARY,
        old="beta_slow=rope.beta_slow",
        new="beta_slow=1.0",
        test=ROTARY_TEST,
    ),
    Mutation(
        name="YaRN's truncate ignored",
        file=ROTARY,
        old="correction_range_round_to_int=rope.truncate",
        new="correction_range_round_to_int=True",
        test=ROTARY_TEST,
    ),
    Mutation(
        name="activations counted in one byte",
        file="mellum2_megatron/planning/memory.py",
        old="    kept = 2 * local * sum(",
        new="    kept = local * sum(",
        test=("tests/planning/test_memory.py", "-k", "by_hand"),
    ),
    Mutation(
        name="tokenizer trained on validation documents too",
        file=PREPARE,
        old='    documents = selection.of("train")\n',
        new="    documents = list(selection.documents)\n",
        test=PREPARE_TEST,
    ),
    Mutation(
        name="a copy of a validation document in training",
        file="mellum2_megatron/data/corpus/selection.py",
        old="        if digest in seen:\n",
        new="        if False:\n",
        test=PREPARE_TEST,
    ),
    Mutation(
        name="verify on tokens shorter than the window",
        file="conversion/verification/verify.py",
        old="    wanted = 2 * (architecture.sliding_window or 0) + 17\n",
        new="    wanted = 17\n",
        test=("tests/conversion/test_rank_scoring.py", "-k", "default_tokens"),
    ),
    Mutation(
        name="FP8 of a hidden size that is no multiple of 16",
        file=RULES,
        old='        "architecture.hidden_size": model.hidden_size,\n',
        new="",
        test=RULES_TEST,
    ),
    Mutation(
        name="FP8 of heads, tensor parallelism forgotten",
        file=RULES,
        old="    heads = model.num_attention_heads * model.head_dim // layout.tp\n",
        new="    heads = model.num_attention_heads * model.head_dim\n",
        test=RULES_TEST,
    ),
    Mutation(
        name="secret word lost",
        file="mellum2_megatron/common/secret_names.py",
        old="CREDENTIALS CREDS BEARER JWT",
        new="CREDENTIALS BEARER JWT",
        test=("tests/common/test_secret_names.py",),
    ),
    Mutation(
        name="backslash in a directive not escaped",
        file="launchers/sbatch.py",
        old=""".replace("\\\\", "\\\\\\\\")""",
        new="",
        test=("tests/launchers/test_sbatch.py", "-k", "read_back"),
    ),
    # More faults on the way from a sample to the loss.
    Mutation(
        name="ends of documents not learnt",
        file=f"{FEED}datasets.py",
        old="eod_mask_loss=False",
        new="eod_mask_loss=True",
        test=FEED_TEST,
    ),
    Mutation(
        name="data.seed ignored",
        file=f"{FEED}datasets.py",
        old="random_seed=_seed(run, split)",
        new="random_seed=run.seed",
        test=FEED_TEST,
    ),
    Mutation(
        name="validation sets of a blend that overlap",
        file=f"{FEED}datasets.py",
        old="sample - ends[source] + shares[source]",
        new="max(0, sample - ends[source] + shares[source] - 1)",
        test=FEED_TEST,
    ),
    Mutation(
        name="blend that reads every second sample twice",
        file=f"{FEED}blend.py",
        old="self.locate(int(index))",
        new="self.locate(int(index) // 2 * 2)",
        test=FEED_TEST,
    ),
    Mutation(
        name="tokenizer trained on validation texts",
        file="mellum2_megatron/data/prepare_packs.py",
        old="        if place(hashes, seed, valid_share)[0] != VALID:\n            yield",
        new="        if True:\n            yield",
        test=("tests/data/test_prepare_packs.py", "-k", "training_documents_alone"),
    ),
    Mutation(
        name="prepared packs that end before the last documents",
        file="mellum2_megatron/data/prepare_packs.py",
        old="replace(phase, tokens=tokens)",
        new="replace(phase, tokens=tokens // 2)",
        test=("tests/data/test_prepare_packs.py", "-k", "good_document_once"),
    ),
    Mutation(
        name="phase that skips the beginning of its data",
        file=f"{FEED}continued_training.py",
        old="self.dataset[int(index) - self.first]",
        new="self.dataset[(int(index) - self.first + 1) % len(self.dataset)]",
        test=PROVIDER_TEST,
    ),
    Mutation(
        name="repository documents with the nearest files first",
        file="mellum2_megatron/data/tokens/repository.py",
        old="related=tuple(reversed(chosen))",
        new="related=tuple(chosen)",
        test=("tests/data/test_repository.py",),
    ),
    Mutation(
        name="near-duplicates of a phase compared from the source's first place",
        file="mellum2_megatron/data/pipeline/selecting.py",
        old="(at - first) % BUCKETS",
        new="at",
        test=("tests/data/test_near_duplicate_scope.py", "-k", "nothing_else"),
    ),
    Mutation(
        name="verdict of a metric of which more is better turned round",
        file=f"{ANSWERING}verdicts.py",
        old="* (-1 if lower_is_better else 1)",
        new="* -1",
        test=("tests/ablations/test_verdicts.py", "-k", "words"),
    ),
    Mutation(
        name="verdicts of several arms without Holm",
        file=f"{ANSWERING}verdicts.py",
        old="factors = np.arange(p.shape[-1], 0, -1)",
        new="factors = np.ones(p.shape[-1])",
        test=("tests/ablations/test_verdicts.py", "-k", "holm"),
    ),
    Mutation(
        name="no difference by one of the two one-sided tests",
        file=f"{ANSWERING}verdicts.py",
        old="np.maximum(above_low, below_high)",
        new="np.minimum(above_low, below_high)",
        test=("tests/ablations/test_verdicts.py", "-k", "words"),
    ),
    Mutation(
        name="a verdict of an early look changed by later seeds",
        file=f"{ANSWERING}verdicts.py",
        old="        seen = values[..., :look]\n",
        new="        seen = values\n",
        test=("tests/ablations/test_verdicts.py", "-k", "stays"),
    ),
    Mutation(
        name="runs compared that differ in more than their arms",
        file=f"{ANSWERING}comparable.py",
        old="and not _covered(key, keys)",
        new="and False",
        test=("tests/ablations/test_comparable.py",),
    ),
    Mutation(
        name="a failed task of a study counts as done",
        file=POOL,
        old="            elif code == 0:\n",
        new="            elif code is not None:\n",
        test=("tests/ablations/test_pool.py", "-k", "named_with_its_log"),
    ),
    Mutation(
        name="the stop rule of a study ends no task",
        file=POOL,
        old='one.early = one.task.limit.verdict(one.task.folder) or ""',
        new='one.early = ""',
        test=("tests/ablations/test_pool.py", "-k", "ends_a_task_for_good"),
    ),
    Mutation(
        name="finished tasks of a study are run again",
        file="ablations/running/tasks.py",
        old='record.state in ("done", "early")',
        new='record.state in ("early",)',
        test=("tests/ablations/test_pool.py", "-k", "run_once_and"),
    ),
    Mutation(
        name="files of a joined repository packed once more alone",
        file="mellum2_megatron/data/pipeline/packing.py",
        old="                chosen = chosen[~np.isin(keys, np.array(joined, dtype=np.uint64))]\n",
        new="",
        test=("tests/data/test_repository_plan.py", "-k", "part_of"),
    ),
    Mutation(
        name="labels of packs one place late",
        file=f"{FEED}packed_dataset.py",
        old="        labels[:-1] = tokens[1:]\n",
        new="        labels[:-1] = tokens[:-1]\n",
        test=("tests/data/test_packs.py",),
    ),
    Mutation(
        name="padding between documents counted as tokens",
        file=STEP,
        old="        cu_seqlens_q=bounds[0],\n        cu_seqlens_kv=bounds[0],\n",
        new="        cu_seqlens_q=bounds[1],\n        cu_seqlens_kv=bounds[1],\n",
        test=(*STEP_TEST, "-k", "packs"),
    ),
    Mutation(
        name="loss summed over masked tokens",
        file=STEP,
        old="torch.sum(output.view(-1).float() * loss_mask.view(-1))",
        new="torch.sum(output.view(-1).float())",
        test=STEP_TEST,
    ),
    Mutation(
        name="masked tokens counted",
        file=STEP,
        old="    tokens = loss_mask.sum().to(torch.int)\n",
        new="    tokens = torch.tensor(loss_mask.numel())\n",
        test=STEP_TEST,
    ),
    Mutation(
        name="losses of validation sets swapped",
        file=STEP,
        old="            of_source_b = source == number\n",
        new="            of_source_b = source == len(names) - 1 - number\n",
        test=STEP_TEST,
    ),
    Mutation(
        name="sliding window one token too long",
        file="mellum2_megatron/model/attention.py",
        old="None if window is None else (window - 1, 0)",
        new="None if window is None else (window, 0)",
        test=("tests/model/test_parity.py", "-x"),
    ),
    Mutation(
        name="exact gradient of the balancing loss not switched on",
        file="mellum2_megatron/model/provider.py",
        old="            configure_routers(model, loss)\n",
        new="            pass\n",
        test=("tests/layouts/test_layouts.py", "-k", "gloo-exact_dp2"),
    ),
)


def copy_tree(target: Path) -> None:
    """Copy the working tree: tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def exit_code(test: Sequence[str], tree: Path) -> int:
    """Run pytest in a tree; return its exit code."""
    words = ["-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", *test]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tree,
        env={
            **os.environ,
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode


def outcome(mutation: Mutation, tree: Path, passing: dict[tuple[str, ...], int]) -> str:
    """Make one mutation in a tree, run its test, and undo it.

    Args:
        mutation, tree: the fault and the copy.
        passing: exit codes of tests in the copy without a fault, filled as needed.
    """
    if mutation.test not in passing:
        passing[mutation.test] = exit_code(mutation.test, tree)
    if passing[mutation.test]:
        return f"no verdict: without it, pytest exits with {passing[mutation.test]}"
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    code = exit_code(mutation.test, tree)
    file.write_text(text, encoding="utf-8")
    if code == TESTS_FAILED:
        return "killed"
    return "SURVIVED" if code == 0 else f"no verdict: pytest exits with {code}"


def main(words: Sequence[str]) -> int:
    """Run the mutations whose names have one of `words`, or all; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="show the names")
    parser.add_argument("words", nargs="*", help="part of a name; none: all mutations")
    options = parser.parse_args(words)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.words or any(word in mutation.name for word in options.words)
    ]
    counts: dict[str, int] = {}
    passing: dict[tuple[str, ...], int] = {}
    with tempfile.TemporaryDirectory(prefix="mellum2-mutations-") as folder:
        if not options.list:
            copy_tree(Path(folder))
        for mutation in chosen:
            verdict = "" if options.list else outcome(mutation, Path(folder), passing)
            counts[verdict] = counts.get(verdict, 0) + 1
            sys.stdout.write(f"{mutation.name} ({mutation.file})  {verdict}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} mutations: {counts}\n" if not options.list else "")
    return int(set(counts) - {"", "killed"} != set())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
