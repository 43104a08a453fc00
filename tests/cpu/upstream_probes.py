"""Probes of the patches in mellum2_megatron/upstream/patches.py; see `patch_probes`."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.upstream import async_writer
from tests.cpu.patch_probes import PROBES, on_two_ranks, one_rank, parse, probe
from tests.model.packing import packed_documents


@probe("compile-helpers")
def _compile_helpers() -> None:
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()


@probe("document-index")
def _document_index() -> None:
    """A million documents, twice: 8 MB of numbers, and those of the array that is copied."""
    from megatron.core.datasets import gpt_dataset

    documents = np.arange(1_000_000, dtype=np.int32)
    for separate in (True, False):
        state = np.random.RandomState(5)
        tracemalloc.start()
        index = gpt_dataset._build_document_index(documents, 2, state, separate)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The order by its definition: one shuffle of both passes, or one of each.
        plain, order = np.random.RandomState(5), np.tile(documents, 2)
        for part in (order[:1_000_000], order[1_000_000:]) if separate else (order,):
            plain.shuffle(part)
        assert index.dtype == np.int32
        assert np.array_equal(index, order)
        assert state.randint(2**31) == plain.randint(2**31)  # what is drawn next
        assert peak < 10_000_000, f"memory of others: {peak:,} bytes, its own {index.nbytes:,}"


@probe("layer-wise-layout")
def _layer_wise_layout() -> None:
    """Muon on the config-container path, which must be refused before it trains."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    one_rank()
    args = parse()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))

    def datasets(_: object) -> None:
        raise AssertionError("Muon was set up without the layer-wise layout")

    with pytest.raises(InputError, match="layer-wise parameter layout"):
        pretrain(container, datasets, ModelType.encoder_or_decoder, None)


@probe("batch-ramp")
def _batch_ramp() -> None:
    """A ramp from 2 to 4 sequences must not be taken for a constant batch of 4."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    one_rank()
    try:
        parse(rampup_batch_size=[2, 2, 100])
    except InputError as refusal:
        outcome = str(refusal)
    else:
        outcome = (
            f"the ramp is ignored: the first batch has {get_current_global_batch_size()} sequences"
        )
    assert outcome.startswith("--rampup-batch-size 2 2 100"), outcome


@probe("fusion-without-apex")
def _fusion_without_apex() -> None:
    """An output layer beside Transformer Engine's: built, and its gradient accumulates."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    one_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )
    config.gradient_accumulation_fusion = True
    layer = ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.ones_, bias=False)
    layer(torch.ones(3, 1, 8))[0].sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((16, 8), 3.0))
    assert config.gradient_accumulation_fusion


@probe("muon-experts")
def _muon_experts() -> None:
    """Two tensor-parallel ranks that hold the same experts, and no data parallelism."""
    from types import SimpleNamespace

    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    divided: list[tuple[int, int]] = []
    optimizer = SimpleNamespace(
        dp_cp=SimpleNamespace(size=lambda: 1),
        expt_dp=SimpleNamespace(size=lambda: 2),
        _shard_params_from_layout=lambda _optimizers, _layouts, dense, experts: divided.append(
            (dense, experts)
        ),
    )
    LayerWiseDistributedOptimizer.shard_params(optimizer, [], full_param_layouts=[])
    assert divided == [(1, 2)], "every rank owns all experts"


def _muon_groups_fit() -> None:
    """A checkpoint of one parameter group, read by a run whose experts have their own group."""
    from types import SimpleNamespace

    from megatron.core.dist_checkpointing.dict_utils import merge
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    one_rank()
    groups = [
        {"params": [number], "is_expert_parallel": number == 1, "max_lr": 0.1, "lr": 0}
        for number in range(2)
    ]
    asked = [group | {"params": LocalNonpersistentObject(group["params"])} for group in groups]
    loaded: list[dict[str, Any]] = []
    inner = SimpleNamespace(
        sharded_state_dict=lambda *_, **__: {"optimizer": {"state": {}, "param_groups": asked}},
        load_state_dict=lambda state: loaded.extend(state["optimizer"]["param_groups"]),
        optimizer=SimpleNamespace(state_dict=lambda: {"param_groups": groups}),
    )
    optimizer = object.__new__(LayerWiseDistributedOptimizer)
    optimizer.chained_optimizers, optimizer.pg_collection, optimizer.model_chunks = (
        [inner],
        None,
        [],
    )
    _, local, _ = load_preprocess(optimizer.sharded_state_dict({}, is_loading=True, metadata={}))
    stored = {
        "optimizer": {"param_groups": [{"is_expert_parallel": False, "max_lr": 0.1, "lr": 0.05}]}
    }
    optimizer.load_state_dict(merge(stored, local))
    assert [group["params"] for group in loaded] == [[0], [1]], "groups without their parameters"
    assert loaded == [group | {"lr": 0.05} for group in groups]


PROBES["muon-groups-asked"] = PROBES["muon-groups-loaded"] = _muon_groups_fit


@probe("gloo-group-timeout")
def _gloo_group_timeout() -> None:
    """Every group of a world of two ranks has the limit that Megatron was given."""

    def limits() -> dict[str, float]:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(distributed_timeout_minutes=61)
        groups = [group for group in parallel_state._global_process_group_list if group]
        backends = {group.group_desc: group._get_backend(torch.device("cpu")) for group in groups}
        return {
            name: backend.options._timeout.total_seconds() / 60
            for name, backend in backends.items()
        }

    for found in on_two_ranks(limits):
        assert {"DATA_PARALLEL_GROUP_GLOO", "EXPERT_DATA_PARALLEL_GROUP_GLOO"} < set(found)
        wrong = {name: minutes for name, minutes in found.items() if minutes != 61}
        assert not wrong, f"another limit than 61 minutes: {wrong}"


@probe("muon-gloo-group")
def _muon_gloo_group() -> None:
    """The Adam part of a Muon run, here a bias, has the group over which it collects its state."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.training.training import wrap_model_chunks_with_ddp

    one_rank()
    parallel_state.initialize_model_parallel()
    chunks = wrap_model_chunks_with_ddp(
        [torch.nn.Linear(4, 6, dtype=torch.bfloat16)],
        TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, bf16=True),
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        use_layer_wise_distributed_optimizer=True,
        use_layer_wise_param_layout=True,
        DP=DistributedDataParallel,
    )
    settings = OptimizerConfig(
        optimizer="muon",
        lr=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_layer_wise_distributed_optimizer=True,
    )
    _, adam = get_megatron_optimizer(settings, chunks).chained_optimizers
    adam.get_parameter_state_dp_zero(use_gloo_comm=True, empty_data=True)
    assert adam.data_parallel_group_gloo is parallel_state.get_data_parallel_group_gloo(
        with_context_parallel=True
    )
    assert adam.data_parallel_group_gloo is not adam.data_parallel_group


@probe("save-checksums")
def _save_checksums() -> None:
    """A tensor written as an asynchronous save does, in a process that was spawned."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    one_rank()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Manager() as manager:
        writer = FileSystemWriterAsync(folder)
        writer.results_queue = manager.Queue()
        item = WriteItem(index=MetadataIndex("w"), type=WriteItemType.SHARD)
        file = Path(folder, "__0_0.distcp")
        writer.write_buckets = [(str(file), file.name, ([], [(item, torch.arange(100))]))]
        write, _, args = writer.get_save_function_and_args()
        worker = spawn.Process(target=write, args=args)
        worker.start()
        worker.join()
        assert list(writer.results_queue.get()) == [0]
        assert torch.equal(torch.load(file), torch.arange(100))
        found = [info.CRC for info in zipfile.ZipFile(file).infolist() if "data/0" in info.filename]
    assert found == [0], f"a CRC-32 in the file: {found}"


@probe("writer-loop")
def _writer_loop() -> None:
    """What a spawned process runs: it is pickled by its name."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    loop = pickle.loads(pickle.dumps(PersistentAsyncCaller.async_loop))
    assert loop.__module__ == async_writer.__name__, "runs upstream's loop alone"


@contextlib.contextmanager
def _writer(last_words: str) -> Iterator[Any]:
    """A caller of Megatron whose process is killed: at once, with a save taken, or it done."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    fork = multiprocessing.get_context("fork")
    kinds = {"_persistent_queue": fork.JoinableQueue, "_persistent_preload_q": fork.JoinableQueue}
    for name, kind in {**kinds, "_persistent_comp_q": fork.Queue}.items():
        setattr(PersistentAsyncCaller, name, kind())
    requests, done = (
        PersistentAsyncCaller._persistent_queue,
        PersistentAsyncCaller._persistent_comp_q,
    )

    def die() -> None:
        if last_words != "none":
            requests.get()
        if last_words == "done":
            done.put(0)
            done.close()
            done.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)

    process = PersistentAsyncCaller._persistent_process = fork.Process(target=die, daemon=True)
    process.start()
    caller = PersistentAsyncCaller()
    caller.process = process
    try:
        yield caller
    finally:
        # Without its patch, `close`, which `__del__` calls, would never return.
        caller.process = None


def _soon(function: Callable[[], Any]) -> Any:
    """Call a function that may wait for ever; return what it returns, or its WorkError."""
    outcome = []

    def call() -> None:
        try:
            outcome.append(function())
        except WorkError as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome, "waits for a process that was killed"
    return outcome[0]


@probe("writer-handed-over")
def _writer_handed_over() -> None:
    """The process is killed between two saves, or while its rank waits for the copy."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

    one_rank()
    request = AsyncRequest(time.sleep, (0,), [], {}, time.sleep, call_idx=0)
    for last_words in ("none", "taken"):
        with _writer(last_words) as caller:
            if last_words == "none":
                caller.process.join()
            error = _soon(functools.partial(caller.schedule_async_call, request))
            assert "has ended by signal 9; its checkpoint is incomplete" in str(error)


@probe("writer-awaited")
def _writer_awaited() -> None:
    """The process is killed at once after it has written, and while it writes."""
    one_rank()
    with _writer("done") as caller:
        caller._persistent_queue.put("a save")
        caller.process.join()
        outcome = _soon(functools.partial(caller.is_current_async_call_done, True))
        assert not isinstance(outcome, WorkError), "what is done counts as lost"
        assert outcome, "what is done counts as one that still writes"
    # Asked again, it must not count as one that has written.
    with _writer("taken") as caller:
        caller._persistent_queue.put("a save")
        caller.process.join()
        for blocking in (False, True, True):
            outcome = _soon(functools.partial(caller.is_current_async_call_done, blocking))
            assert isinstance(outcome, WorkError), "waits for a process that was killed"


@probe("writer-closed")
def _writer_closed() -> None:
    """The process is killed with a save that nobody has taken."""
    with _writer("none") as caller:
        caller._persistent_queue.put("a save")
        caller.process.join()
        _soon(caller.close)
        assert caller.process is None


@probe("kept-plans")
def _kept_plans() -> None:
    """Four saves with kept plans. The third has a tensor more, the fourth another shape of one."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from torch.distributed.checkpoint import FileSystemReader

    one_rank()
    parallel_state.initialize_model_parallel()
    base = TorchDistSaveShardedStrategy(cached_metadata=True)
    strategy = FullyParallelSaveStrategyWrapper(
        base, parallel_state.get_data_parallel_group(), do_cache_distribution=True
    )
    for shapes in ({"a": 2}, {"a": 2}, {"a": 2, "b": 3}, {"a": 4, "b": 3}):
        with tempfile.TemporaryDirectory() as folder:
            state = {
                key: ShardedTensor.from_rank_offsets(key, torch.zeros(size))
                for key, size in shapes.items()
            }
            strategy.save(state, Path(folder))
            stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        missing = [key for key in shapes if key not in stored]
        assert not missing, f"saved without {', '.join(missing)}"
        assert {key: entry.size.numel() for key, entry in stored.items()} == shapes


@probe("packed-mtp")
def _packed_mtp() -> None:
    """Two documents, with three and two tokens in four positions each."""
    import torch
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    packed = packed_documents([3, 2], [4, 4])
    tokens = torch.tensor([[11, 12, 13, 9, 21, 22, 9, 9]])
    rolled, total = roll_tensor(tokens, packed_seq_params=packed)
    assert rolled.tolist() == [[12, 13, 0, 0, 22, 0, 0, 0]], (
        f"{rolled.tolist()} after {tokens.tolist()}"
    )
    assert total == 47


@probe("context-mtp")
def _context_mtp() -> None:
    """Eight tokens on two ranks, seven with a next one: each of the seven has the same weight."""
    for per_token, weight in (
        (False, 2 / 7),
        (True, 8 / 7),
    ):  # DDP divides by two ranks, or finalize by eight tokens
        for rank, found in enumerate(on_two_ranks(functools.partial(_mtp_weights, per_token))):
            has_next = [1, 1, 1, 0] if rank == 0 else [1, 1, 1, 1]
            assert found == pytest.approx([weight * each for each in has_next]), (
                f"rank {rank} of 2 weighs {found}"
            )
    # Of two layers each has half the factor; six tokens have one after the next.
    for rank, found in enumerate(on_two_ranks(functools.partial(_mtp_weights, False, 2))):
        counted = ([1, 1, 1, 0], [1, 1, 0, 0]) if rank == 0 else ([1] * 4, [1] * 4)
        expected = [
            each / tokens for row, tokens in zip(counted, (7, 6), strict=True) for each in row
        ]
        assert found == pytest.approx(expected), f"rank {rank} of 2 weighs {found} with two layers"


def _mtp_weights(per_token: bool, layers: int = 1) -> list[float]:
    """The gradient of the MTP loss in each token's logit, on one of two context-parallel ranks."""
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer import multi_token_prediction as mtp

    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        mtp_num_layers=layers,
        mtp_loss_scaling_factor=1.0,
        calculate_per_token_loss=per_token,
    )
    # Four tokens of the trunk, four of each MTP layer.
    hidden = torch.zeros(4 * (1 + layers), 1, 1, requires_grad=True)
    mtp.process_mtp_loss(
        hidden_states=hidden,
        labels=torch.zeros(1, 4, dtype=torch.long),
        loss_mask=torch.ones(1, 4),
        output_layer=lambda states, **_: (states, None),
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda labels, logits: logits[..., 0].T,
        config=config,
        cp_group=torch.distributed.group.WORLD,
    ).sum().backward()
    assert hidden.grad is not None
    return [float(weight) for weight in hidden.grad[4:].flatten()]


class _ChunkedLayer:
    """An output layer with a chunk; Megatron must not call it."""

    sequence_parallel = False
    head_chunk = 3

    def __init__(self) -> None:
        import torch

        self.weight = torch.eye(5, 2)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the logits of all tokens at once")


@probe("chunked-mtp")
def _chunked_mtp() -> None:
    """Four tokens in chunks of three: the head's own cross entropy, of the next labels."""
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer import multi_token_prediction as mtp

    config = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        mtp_num_layers=1,
        mtp_loss_scaling_factor=1.0,
    )
    hidden = torch.randn(8, 1, 2, requires_grad=True)
    layer = _ChunkedLayer()
    mtp.process_mtp_loss(
        hidden_states=hidden,
        labels=torch.tensor([[4, 1, 0, 2]]),
        loss_mask=torch.ones(1, 4),
        output_layer=layer,
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=None,
        config=config,
        tp_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
    ).sum().backward()
    copy = hidden.detach()[4:7, 0].requires_grad_()
    losses = torch.nn.functional.cross_entropy(copy @ layer.weight.T, torch.tensor([1, 0, 2]))
    losses.backward()
    assert hidden.grad is not None
    assert copy.grad is not None
    assert torch.allclose(hidden.grad[4:7, 0], copy.grad, atol=1e-6)


@probe("chunked-acceptance")
def _chunked_acceptance() -> None:
    """Four tokens in chunks of three; logits are the first two entries and zeros."""
    import torch
    from megatron.core.transformer import multi_token_prediction as mtp

    from mellum2_megatron.model.chunked_head import ChunkedHead

    head = ChunkedHead(_ChunkedLayer(), 3, SimpleNamespace(size=lambda: 1, rank=lambda: 0))  # type: ignore[arg-type]
    hidden = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [1.0, 2.0]]).unsqueeze(1)
    head(hidden)
    labels, mask = torch.tensor([[1, 1, 2, 1]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    counts = mtp._compute_mtp_acceptance_counts(hidden, labels, mask, head, None)
    assert [float(count) for count in counts] == [2.0, 3.0], f"{counts[0]} of {counts[1]} accepted"


@probe("planned-documents")
def _planned_documents() -> None:
    """The plan of an MTP layer's first part: what embeddings and attention get."""
    from megatron.core.models.common import fine_grained_callables as plan

    class Layer:
        mtp_model_layer: Any
        config = SimpleNamespace(sequence_parallel=False)
        got: Any

        def _get_embeddings(self, **kwargs: Any) -> tuple[None, ...]:
            self.got = kwargs["packed_seq_params"]
            return (None,) * 5

        def _concat_embeddings(self, *_: Any) -> None: ...

        def _forward_attention(self, **kwargs: Any) -> None:
            self.got = kwargs["packed_seq_params"]

    layer, inner, documents = Layer(), Layer(), object()
    layer.mtp_model_layer = inner

    def attend(node: Any, _: Any) -> None:
        inner._forward_attention(packed_seq_params=node.chunk_state.packed_seq_params)

    stock = plan.build_layer_callables, plan.get_layer_moe_metadata
    plan.build_layer_callables = lambda _: ([attend] * 5, {"pre_dispatch_computation": []})
    plan.get_layer_moe_metadata = lambda _: (True, 1)
    layer.eh_proj = None  # type: ignore[attr-defined]
    state = SimpleNamespace(
        packed_seq_params=documents,
        mtp_hidden_states=[],
        input_ids=None,
        position_ids=None,
        padding_mask=None,
        context=None,
        model=SimpleNamespace(embedding=None),
    )
    try:
        first = plan.build_mtp_layer_callables(layer)[0][0]
        first(SimpleNamespace(chunk_state=state, is_first_layer=False), None)
    finally:
        plan.build_layer_callables, plan.get_layer_moe_metadata = stock
    assert layer.got is inner.got is state.packed_seq_params is documents
    assert "_get_embeddings" not in vars(layer)


@probe("padded-counts")
def _padded_counts() -> None:
    """Two ranks with one and two real tokens of three, each token sent to two experts."""
    for counts, local, total, integer in on_two_ranks(_counts):
        assert (counts, total) == ([2, 3, 1], 3)
        assert local == 1.5, f"a rank's own tokens: {local}"
        assert integer, "a number of tokens that is no integer"


def _counts() -> list[Any]:
    import torch
    from megatron.core.transformer.moe import router

    sent = [[[1, 1, 0], [0, 0, 0], [0, 0, 0]], [[1, 1, 0], [0, 1, 1], [0, 0, 0]]][
        torch.distributed.get_rank()
    ]
    counts, local, total = router.get_tokens_per_expert_and_token_count(
        torch.tensor(sent).bool(), torch.distributed.group.WORLD, topk=2, with_padding_mask=True
    )
    return [counts.tolist(), float(local), int(total), total.dtype == torch.int64]


class _Marker:
    """Pickles as a call that makes a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


@probe("metadata-pickle")
def _metadata_pickle() -> None:
    from torch.distributed.checkpoint import FileSystemReader

    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "marker")
        Path(folder, ".metadata").write_bytes(pickle.dumps(_Marker(str(marker))))
        with contextlib.suppress(Exception):
            FileSystemReader(folder).read_metadata()
        assert not marker.exists(), ".metadata was executed"


@probe("object-pickle")
def _object_pickle() -> None:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "marker")
        stored = io.BytesIO()
        torch.save(_Marker(str(marker)), stored)
        stored.seek(0)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.state_dict = {}
        item = SimpleNamespace(dest_index=SimpleNamespace(fqn="rng"))
        with contextlib.suppress(Exception):
            planner.load_bytes(item, stored)
        assert not marker.exists(), "a stored object was executed"
        # What training stores comes back.
        state = [{"a": torch.arange(3), "b": np.arange(2, dtype=np.uint32), "c": (1, None, "x")}]
        stored = io.BytesIO()
        torch.save(state, stored)
        stored.seek(0)
        planner.load_bytes(item, stored)
        assert str(planner.state_dict["rng"]) == str(state), "another value"
