"""One rank of the tests of initial weights by name: its weights, under global names and places."""

from __future__ import annotations

import torch

from tests.layouts.worker import Case, build, global_names

SEED = 11


def weights(case: Case, rank_seed: int = 1) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Return the rank's place in each parallelism, and its weights drawn by name.

    Args:
        case: the layout and the model.
        rank_seed: Megatron's own seed, of which nothing may depend.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp if case.vpp > 1 else None,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
    )
    torch.manual_seed(rank_seed)
    model_parallel_cuda_manual_seed(rank_seed)
    ranks = {
        "tp": mpu.get_tensor_model_parallel_rank(),
        "ep": mpu.get_expert_model_parallel_rank(),
        "etp": mpu.get_expert_tensor_parallel_rank(),
    }
    found = {}
    for chunk in build(case, "cpu", seed_by_name=SEED):
        for name, parameter in global_names(chunk, case, ranks).items():
            found[name] = parameter.detach().clone()
    return ranks, found
