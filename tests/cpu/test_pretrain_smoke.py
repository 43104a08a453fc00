"""Stock Megatron's ``pretrain`` on real gloo processes: layouts train and resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mellum2_megatron.common.errors import InputError
from mellum2_megatron.cpu.replacements import check_arguments
from tests.cpu.tiny_pretrain import arguments
from tests.distributed import DistributedError, run_distributed

pytestmark = pytest.mark.distributed

PRETRAIN = "tests.cpu.tiny_pretrain:pretrain"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2-reshardable": (2, {"dist_ckpt_optim_fully_reshardable": True}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-vpp2": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers": 4,
            "num_virtual_stages_per_pipeline_rank": 2,
        },
    ),
    "ep2-dp2": (4, {"expert_model_parallel_size": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Six iterations equal three, a checkpoint, and three more: every loss, every weight."""
    nproc, layout = LAYOUTS[name]
    whole = run_distributed(PRETRAIN, nproc, train_iters=6, **layout)
    save = {"save": str(tmp_path), "save_interval": 3, "exit_interval": 3}
    before = run_distributed(PRETRAIN, nproc, train_iters=6, **save, **layout)
    after = run_distributed(PRETRAIN, nproc, train_iters=6, load=str(tmp_path), **layout)

    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    for rank in range(nproc):
        assert whole[rank]["losses"] == before[rank]["losses"] + after[rank]["losses"]
        assert whole[rank]["weights"] == after[rank]["weights"]
        assert whole[rank]["weights"] != before[rank]["weights"]
    assert any(result["losses"] for result in whole)


def test_two_data_parallel_ranks_train_as_one_process() -> None:
    """Layer-wise Muon and distributed Adam shard state, not arithmetic: weights are bitwise equal.

    One micro-batch a rank, so that gradients are summed in the same order; no clipping, whose norm
    is summed in another; no auxiliary loss, which Megatron computes against a running count that
    depends on the layout.
    """
    same: dict[str, Any] = {
        "global_batch_size": 2,
        "clip_grad": 0,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0,
    }
    (one,) = run_distributed(PRETRAIN, 1, **same)
    first, second = run_distributed(PRETRAIN, 2, **same)
    assert one["losses"][0::2] == first["losses"]
    assert one["losses"][1::2] == second["losses"]
    assert one["weights"] == first["weights"] == second["weights"]


def test_recomputing_activations_changes_nothing() -> None:
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    assert run_distributed(PRETRAIN, 1, **recompute) == run_distributed(PRETRAIN, 1)


def test_dropout_follows_the_tracked_generators_through_a_resume(tmp_path: Path) -> None:
    """With dropout the losses depend on every random state that a checkpoint holds."""
    random: dict[str, Any] = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "train_iters": 4}
    (whole,) = run_distributed(PRETRAIN, 1, **random)
    (before,) = run_distributed(
        PRETRAIN, 1, save=str(tmp_path), save_interval=2, exit_interval=2, **random
    )
    (after,) = run_distributed(PRETRAIN, 1, load=str(tmp_path), **random)
    assert whole["losses"] == before["losses"] + after["losses"]
    assert whole["losses"] != run_distributed(PRETRAIN, 1, train_iters=4)[0]["losses"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"distributed_backend": "nccl"}, "distributed_backend=nccl"),
        (
            {"async_save": True, "use_persistent_ckpt_worker": True, "save": "unused"},
            "async_save=True",
        ),
    ],
    ids=["nccl", "async_save"],
)
def test_gpu_features_are_refused_before_the_model_is_built(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(DistributedError) as failure:
        run_distributed(PRETRAIN, 1, **change)
    assert f"InputError: {named}" in str(failure.value)
    assert "number of parameters" not in str(failure.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fp8", "hybrid"), ("transformer_impl", "transformer_engine"), ("cuda_graph_impl", "local")],
)
def test_other_gpu_arguments_are_refused(name: str, value: str) -> None:
    values = {"distributed_backend": "gloo", "async_save": False, "fp8": None, "fp4": None}
    values |= {"transformer_impl": "local", "cuda_graph_impl": "none"}
    check_arguments(type("Args", (), values))
    with pytest.raises(InputError, match=f"{name}={value}"):
        check_arguments(type("Args", (), values | {name: value}))


def test_command_line_of_the_tiny_run() -> None:
    line = arguments(bf16=False, lr=3.0, betas=[1, 2])
    assert "--bf16" not in line
    assert line[line.index("--lr") + 1] == "3.0"
    assert line[line.index("--betas") :][:3] == ["--betas", "1", "2"]
