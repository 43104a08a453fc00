"""Time and memory of planning a save and a load, for all ranks of a 12B run, on one CPU.

::

    python -m benchmarks.checkpoint_planning                    # benchmarks/NOTES.md
    python -m benchmarks.checkpoint_planning --ranks 8

No tensor has values and no rank is a process. A rank's model is built on torch's "meta" device in a
world of torch's "fake" backend; its sharded state is Megatron's own. Owners of Muon's matrices come
from `planning.gradient_buffers`. Megatron's and torch's planning functions then run on the states
of all ranks, and the exchange of objects between them is a list of pickles, which the measured rank
unpickles. What a network would add is therefore given in bytes. Each step runs in a fork of its
own. Processor seconds hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mellum2_megatron.config import Run, apply_overrides
from mellum2_megatron.planning.gradient_buffers import ownership
from mellum2_megatron.recipes import recipe

RECIPE = "mellum2_12b_pretrain_phase1"
RANKS = 256

ADAM = ("fp32_param", "exp_avg", "exp_avg_sq")
MUON = ("fp32_param", "momentum_buffer")

State = dict[str, Any]
"""A rank's sharded tensors and objects, by a key that is unique on the rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Cost of one step of planning on one rank.

    Attributes:
        name: what is planned, and where.
        seconds: processor seconds.
        peak: main memory above that at its start, in bytes.
        exchanged: bytes that all ranks together hand to the others before it.
    """

    name: str
    seconds: float
    peak: int
    exchanged: int = 0

    def __post_init__(self) -> None:
        sys.stderr.write(f"{self}\n")


def states(run: Run, ranks: int) -> list[State]:
    """Return the sharded state that each rank saves: model, Adam and Muon, without values.

    Args:
        run: a resolved Muon run with ``layout.tp`` and ``layout.pp`` of 1, and data parallelism
            that fills `ranks`.
        ranks: world size.
    """
    owned = {
        part.group: [{weight.name for weight in weights} for weights in part.owned]
        for part in ownership(run, ranks, "torch")
    }
    muon = {name for parts in owned.values() for names in parts for name in names}
    ep = run.layout.ep
    models = [_model_state(run, ranks, rank) for rank in range(ep)]
    result = []
    for rank in range(ranks):
        tensors, objects = models[rank % ep]
        state = {}
        for name, entry in objects.items():
            expert = ".experts." in entry.key and "experts" in owned
            state[name] = replace(entry, replica_id=(0, 0, rank // ep if expert else rank))
        own = owned["dense"][rank] | (owned["experts"][rank // ep] if "experts" in owned else set())
        for name, shards in tensors.items():
            expert = ".experts." in name and "experts" in owned
            replica = (0, 0, rank // ep if expert else rank)
            for number, shard in enumerate(shards):
                state[f"{name}.{number}"] = replace(shard, replica_id=replica)
                if name not in muon:
                    _add_state(state, f"{name}.{number}", shard, ADAM, replica)
                elif name in own:
                    _add_state(state, f"{name}.{number}", shard, MUON, 0)
        result.append(state)
    return result


def _add_state(state: State, name: str, shard: Any, keys: Sequence[str], replica: Any) -> None:
    """Add the optimizer's tensors of a weight to a rank's state."""
    import torch

    for key in keys:
        full = torch.empty(shard.local_shape, dtype=torch.float32, device="meta")
        state[f"{key}.{name}"] = replace(
            shard,
            key=f"optimizer.state.{key}.{shard.key}",
            data=full,
            dtype=torch.float32,
            replica_id=replica,
        )


def _model_state(run: Run, ranks: int, rank: int) -> tuple[dict[str, list[Any]], State]:
    """Build the model of a rank, and return its shards by parameter, and its objects."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from mellum2_megatron.model.provider import model_provider
    from mellum2_megatron.model.transformer_config import transformer_config

    with _world(rank, ranks):
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=run.layout.ep, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = transformer_config(
            run.architecture,
            expert_model_parallel_size=run.layout.ep,
            pipeline_dtype=torch.bfloat16,
            params_dtype=torch.bfloat16,
            bf16=True,
            perform_initialization=False,
            moe_token_dispatcher_type="alltoall",
        )
        provide = model_provider(run.architecture, "torch", loss=run.loss)
        with torch.device("meta"):
            model = provide(pre_process=True, post_process=True, vp_stage=None, config=config)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sharded = model.sharded_state_dict(
            metadata={"singleton_local_shards": False, "dp_cp_group": group}
        )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors: dict[str, list[Any]] = {}
        objects: State = {}
        for number, entry in enumerate(nested_values(sharded)):
            if isinstance(entry, ShardedObject):
                objects[f"object.{number}"] = entry
                continue
            name = names[id(entry.data)]
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            tensors[name] = [
                replace(shard, data=shard.data.detach()) for shard in nested_values({0: built})
            ]
        parallel_state.destroy_model_parallel()
    assert tensors.keys() == set(names.values())
    return tensors, objects


@contextlib.contextmanager
def _world(rank: int, ranks: int) -> Iterator[None]:
    """Be one rank of a world of torch's fake backend."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    device, torch.cuda.current_device = torch.cuda.current_device, lambda: "meta"  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = device
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _gathered(pickles: Sequence[bytes]) -> Iterator[None]:
    """Answer an exchange of objects with those of all ranks."""
    import torch

    def all_gather_object(result: list[Any], _own: Any, group: Any = None) -> None:
        result[:] = [pickle.loads(each) for each in pickles]

    original = torch.distributed.all_gather_object
    torch.distributed.all_gather_object = all_gather_object
    try:
        yield
    finally:
        torch.distributed.all_gather_object = original


def _measured(
    name: str, function: Callable[[], Any], *, exchanged: Sequence[bytes] = ()
) -> tuple[Any, Step]:
    """Call a function in a fork; return its result, and what the step of this name costs.

    Args:
        name: name of the step.
        function: work of one rank in it.
        exchanged: what the ranks hand to each other before it.
    """
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                before = _status("VmRSS")
                begin = time.process_time()
                result = function()
                spent = time.process_time() - begin
                peak = _status("VmHWM") - before
                pickle.dump((result, spent, peak), answer)
                answer.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError("a step failed; its message stands above")
        answer.seek(0)
        result, spent, peak = pickle.load(answer)
    return result, Step(name=name, seconds=spent, peak=peak, exchanged=sum(map(len, exchanged)))


def _status(field: str) -> int:
    """Return a field of this process' status in bytes: "VmRSS" or, for the peak, "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _without_data(state: State) -> bytes:
    return pickle.dumps([entry.without_data() for entry in state.values()])


def _tensors_without_data(state: State) -> bytes:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return pickle.dumps(
        [each.without_data() for each in state.values() if isinstance(each, ShardedTensor)]
    )


def _check_step(name: str, all_states: list[State]) -> Step:
    """Check on rank 0 that the shards of all ranks cover every tensor once; return its cost."""
    from megatron.core.dist_checkpointing.validation import (
        determine_global_metadata,
        validate_sharding_integrity,
    )

    shards = [_without_data(state) for state in all_states]

    def check() -> None:
        with _gathered(shards):
            validate_sharding_integrity(determine_global_metadata(all_states[0])[1])

    return _measured(name, check, exchanged=shards)[1]


def save_steps(all_states: list[State]) -> tuple[list[Step], bytes]:
    """Plan a save as Megatron does; return the cost of each step on rank 0, and the metadata."""
    import torch
    from megatron.core.dist_checkpointing.exchange_utils import (
        determine_main_replica_uniform_distribution,
    )
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        distribute_main_replicas_with_precomputed_distribution as distribute,
    )
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    ranks = len(all_states)
    steps = []

    with _world(0, ranks):
        group = torch.distributed.group.WORLD
        steps.append(_check_step("check that shards cover all tensors (rank 0)", all_states))
        tensors = [_tensors_without_data(state) for state in all_states]

        def assign() -> Any:
            with _gathered(tensors):
                return determine_main_replica_uniform_distribution(all_states[0], group)

        distribution, step = _measured(
            "choose each shard's writer (every rank)", assign, exchanged=tensors
        )
        steps.append(step)
    for rank, state in enumerate(all_states):
        with _world(rank, ranks):
            distribute(state, torch.distributed.group.WORLD, distribution)
    with _world(0, ranks):
        steps.append(_check_step("the check once more, with writers (rank 0)", all_states))
    plans = []
    for rank, state in enumerate(all_states):
        with _world(rank, ranks):
            if rank == 0:
                _, step = _measured(
                    "plan of its own items (every rank)",
                    lambda: len(_local_save_plan(all_states[0]).items),
                )
                steps.append(step)
            plans.append(pickle.dumps(_local_save_plan(state)))

    def globally() -> bytes:
        everyone = [pickle.loads(each) for each in plans]
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        _, metadata = planner.create_global_plan(everyone)
        metadata.all_local_plans = everyone
        # What the file holds besides: the place of each item in the files.
        metadata.storage_data = {
            item.index: _StorageInfo(f"__{rank}_0.distcp", 0, 0)
            for rank, plan in enumerate(everyone)
            for item in plan.items
        }
        return pickle.dumps(metadata)

    with _world(0, ranks):
        metadata, step = _measured("plan of all, and metadata (rank 0)", globally, exchanged=plans)
        steps.append(step)
    return steps, metadata


def _local_save_plan(state: State) -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(dict(state), True)
    planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(flat, False), is_coordinator=False)
    return planner.create_local_plan()


def load_steps(all_states: list[State], metadata: bytes, ep: int) -> list[Step]:
    """Plan a load as Megatron does; return the cost of each step on a rank.

    The lists of shards are gathered, for a check and to choose readers. Plans are not:
    `torch.distributed.checkpoint.load` is called with ``no_dist=True``
    (core/dist_checkpointing/strategies/torch.py:979, 0.19.2).

    Args:
        all_states: what each rank asks for.
        metadata: content of ``.metadata``.
        ep: expert-parallel ranks; those with the same experts read together.
    """
    import torch
    from megatron.core.dist_checkpointing.exchange_utils import (
        determine_main_replica_uniform_distribution,
    )

    from mellum2_megatron.checkpoint.safe_metadata import parse_metadata

    ranks = len(all_states)
    steps = []
    with _world(0, ranks):
        steps.append(_check_step("check that shards cover all tensors (rank 0)", all_states))
    readers = all_states if ep == ranks else all_states[::ep]
    tensors = [_tensors_without_data(state) for state in readers]

    def assign() -> int:
        with _gathered(tensors):
            group = torch.distributed.group.WORLD  # of as many ranks as read together
            chosen = determine_main_replica_uniform_distribution(readers[0], group, True)
        return len(chosen.main_rank_for_shard)

    with _world(0, len(readers)):
        _, step = _measured(
            "choose each shard's reader (every rank of a group)", assign, exchanged=tensors
        )
        steps.append(step)
    _, step = _measured(
        "read of .metadata (every rank)",
        lambda: len(parse_metadata(metadata, "metadata").storage_data),
    )
    steps.append(step)
    known = pickle.loads(metadata)
    with _world(0, ranks):
        _, step = _measured(
            "plan of its own items (every rank)",
            lambda: len(_local_load_plan(all_states[0], known).items),
        )
        steps.append(step)
    return steps


def _local_load_plan(state: State, metadata: Any) -> Any:
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreLoadPlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(dict(state))
    planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # What `set_up_planner` sets; it also gives memory to tensors without any.
    planner.state_dict, planner.metadata = mcore_to_pyt_state_dict(flat, True), metadata
    return planner.create_local_plan()


def bytes_read(all_states: list[State], groups: int) -> tuple[int, int]:
    """Return the bytes that all ranks read in a load, and those that they receive instead.

    Every rank asks for all of its own tensors, also for those that others have. In a group one rank
    reads each of them and sends it to all the others, also to those that did not ask for it, unless
    it is the only one to need it (core/dist_checkpointing/exchange_utils.py:492, 0.19.2).

    Args:
        all_states: what each rank asks for.
        groups: number of groups; rank r belongs to group r modulo this number. As many groups as
            ranks: each reads for itself.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    read = received = 0
    for first in range(groups):
        members = all_states[first::groups]
        sizes: dict[Any, int] = {}
        askers: Counter[Any] = Counter()
        for state in members:
            for shard in state.values():
                if isinstance(shard, ShardedTensor):
                    name = shard.key, shard.global_offset
                    sizes[name] = shard.data.numel() * shard.data.element_size()
                    askers[name] += 1
        read += sum(sizes.values())
        received += sum(size for name, size in sizes.items() if askers[name] > 1) * (
            len(members) - 1
        )
    return read, received


def reading(all_states: list[State], ep: int) -> str:
    """Return what a load reads and receives as Markdown, by the ranks that read together.

    Args:
        all_states: what each rank asks for.
        ep: expert-parallel ranks.
    """
    ranks = len(all_states)
    rows = [
        ("every rank for itself", ranks),
        ("the ranks with the same experts", ep),
        ("the data-parallel group", 1),
    ]
    lines = [
        "| who reads each tensor once | groups | all ranks read, GB | a rank reads, GB "
        "| a rank receives, GB |",
        "|---|---|---|---|---|",
    ]
    # Megatron's group is the last; upstream/arguments.py takes the one before, if it is not a rank.
    for name, groups in rows:
        read, received = bytes_read(all_states, groups)
        lines.append(
            f"| {name} | {groups} | {read / 1e9:.4g} | {read / ranks / 1e9:.3g} "
            f"| {received / ranks / 1e9:.3g} |"
        )
    return "\n".join(lines)


def table(run: Run, ranks: int) -> str:
    """Return the costs of planning and of reading as Markdown."""
    all_states = states(run, ranks)
    ep = run.layout.ep
    stored, _ = bytes_read(all_states, 1)
    read = reading(all_states, ep)  # before the save's plan changes the states
    saving, metadata = save_steps(all_states)
    lines = [
        "| | step | processor seconds | memory, GB | exchanged, MB |",
        "|---|---|---|---|---|",
    ]
    for kind, steps in (("save", saving), ("load", load_steps(all_states, metadata, ep))):
        for step in steps:
            lines.append(
                f"| {kind} | {step.name} | {step.seconds:.1f} | {step.peak / 1e9:.2f} "
                f"| {step.exchanged / 1e6:.0f} |"
            )
    lines += [
        "",
        f"{ranks} ranks: .metadata has {len(metadata) / 1e6:.0f} MB, the checkpoint "
        f"{stored / 1e9:.4g} GB.",
        "",
        read,
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the table to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default=RECIPE, help="a Muon recipe without tp and pp")
    parser.add_argument("--ranks", type=int, default=RANKS, help="world size")
    args = parser.parse_args()
    from mellum2_megatron import cpu

    cpu.activate()
    run = apply_overrides(recipe(args.recipe), [f"layout.dp={args.ranks}"])
    sys.stdout.write(table(run, args.ranks) + "\n")


if __name__ == "__main__":
    main()
