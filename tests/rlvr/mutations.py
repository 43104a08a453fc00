"""Known faults of rewards, tasks and the objective of reinforcement learning."""

from __future__ import annotations

from tests.mutation import Mutation

OBJECTIVE, OBJECTIVE_TEST = (
    "mellum2_megatron/rlvr/objective.py",
    ("tests/rlvr/test_objective.py",),
)

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
        old="if similarity >= least:",
        new="if similarity > 1:",
        test=("tests/rlvr/test_tasks.py",),
    ),
    Mutation(
        name="programs inside `all` are started without a sandbox",
        file="mellum2_megatron/rlvr/tasks.py",
        old='any(name == "code" for name, _ in parts_of(self.verifier, self.arguments))',
        new='self.verifier == "code"',
        test=("tests/rlvr/test_faults.py", "-k", "without_a_sandbox_are"),
    ),
    Mutation(
        name="a reference is not judged",
        file="mellum2_megatron/rlvr/tasks.py",
        old="    if verdict.reward < 1:",
        new="    if verdict.reward < 0:",
        test=("tests/rlvr/test_tasks.py",),
    ),
    Mutation(
        name="a reward function that ends its process gives 0",
        file="mellum2_megatron/rlvr/rewards/verifiers.py",
        old='said = {"error": str(error)}',
        new='said = {"reward": 0.0 * len(str(error))}',
        test=("tests/rlvr/test_verifiers.py",),
    ),
    Mutation(
        name="programs in the sandbox keep the network",
        file="mellum2_megatron/rlvr/rewards/bubblewrap.py",
        old='"--unshare-all", "--unshare-user"',
        new='"--unshare-all", "--share-net", "--unshare-user"',
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="the size of /tmp has no limit",
        file="mellum2_megatron/rlvr/rewards/bubblewrap.py",
        old='*("--size", disk, "--tmpfs", "/tmp"',
        new='*("--tmpfs", "/tmp"',
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="the first process of a namespace can be taken over",
        file="mellum2_megatron/rlvr/rewards/bubblewrap.py",
        old='            *("--ro-bind", "/dev/null", "/proc/1/mem"),\n',
        new="",
        test=("tests/rlvr/test_sandbox.py",),
    ),
    Mutation(
        name="a program can hide from the watch",
        file="mellum2_megatron/rlvr/rewards/seccomp.py",
        old='(_JUMP_EQUAL, "deny", "grant", _SET_DUMPABLE)',
        new='(_JUMP_EQUAL, "grant", "grant", _SET_DUMPABLE)',
        test=("tests/rlvr/test_apptainer.py",),
    ),
    Mutation(
        name="the watch does not count processes",
        file="mellum2_megatron/rlvr/rewards/watch.py",
        old="if threads > limits.processes:",
        new="if threads > limits.processes * 1000:",
        test=("tests/rlvr/test_apptainer.py", "-k", "threads_count"),
    ),
    Mutation(
        name="a container's own report is not read",
        file="mellum2_megatron/rlvr/rewards/sandbox.py",
        old="    if faults:\n",
        new="    if not facts:\n",
        test=("tests/rlvr/test_apptainer.py", "-k", "no_sandbox"),
    ),
    Mutation(
        name="an Apptainer that failed is a program's exit code",
        file="mellum2_megatron/rlvr/rewards/watch.py",
        old="if not self._runs or (code is None",
        new="if (code is None",
        test=("tests/rlvr/test_apptainer.py", "-k", "no_verdict"),
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
        name="a NaN of the training model is outside the band",
        file="mellum2_megatron/training/rollouts.py",
        old="result.loss if is_sound else result.loss * math.nan",
        new="result.loss",
        test=("tests/rlvr/test_faults.py", "-k", "only_the_engine"),
    ),
)
