"""One rank of the tests of packs: losses of a micro-batch through training's own step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LENGTH = 64
SEQUENCES = 2


def dataset(prefix: str) -> Any:
    from mellum2_megatron.data.feed.packed_dataset import PackedDataset
    from mellum2_megatron.data.tokens.pack_files import PackShard
    from tests.data.packs import entry_of

    return PackedDataset(
        [entry_of(PackShard(Path(prefix)))],
        samples=None,
        key=1,
        index_split=None,
        document_attention=True,
    )


def model_of(case: Any) -> torch.nn.Module:
    """Return the layout tests' model, the same weights in every layout."""
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from tests.layouts.worker import build, global_names, initial_value

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        expert_tensor_parallel_size=case.etp,
    )
    model_parallel_cuda_manual_seed(1)
    ranks = {
        "tp": mpu.get_tensor_model_parallel_rank(),
        "cp": mpu.get_context_parallel_rank(),
        "pp": 0,
        "ep": 0,
        "etp": mpu.get_expert_tensor_parallel_rank(),
        "dp": 0,
    }
    (model,) = build(case, "cpu")
    with torch.no_grad():
        for name, parameter in global_names(model, case, ranks).items():
            parameter.copy_(initial_value(name, parameter, case, ranks))
    return model.eval()


def packed_losses(prefix: str, *, tp: int = 1, cp: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and loss mask of this rank's tokens of the first packs, `[t / cp]` each."""
    from megatron.core import parallel_state as mpu

    from mellum2_megatron.training import step
    from tests.layouts.worker import Case

    model = model_of(Case(tp=tp, etp=tp, cp=cp))
    step.get_args = lambda: SimpleNamespace(  # type: ignore[assignment]
        context_parallel_size=cp,
        micro_batch_size=SEQUENCES,
        seq_length=LENGTH,
        mtp_num_layers=1,
        pipeline_model_parallel_size=1,
    )
    loader = torch.utils.data.DataLoader(dataset(prefix), batch_size=SEQUENCES)
    iterator = iter(loader) if mpu.get_tensor_model_parallel_rank() == 0 else None
    with torch.no_grad():
        output, loss = step.forward_step(iterator, model, documents=True)  # type: ignore[arg-type]
    return output[0], loss.args[0][0]


def losses_alone(prefix: str) -> list[torch.Tensor]:
    """Return the loss of each piece of the first packs, computed alone, `[length - 1]` each."""
    from tests.layouts.worker import Case

    model, packs = model_of(Case()), dataset(prefix)
    found = []
    with torch.no_grad():
        for index in range(SEQUENCES):
            place = packs.place(index)
            shard = packs.shard(place.shard)
            pieces = shard.pieces(place.pack)
            for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
                tokens = torch.from_numpy(
                    shard.tokens(place.pack)[start : start + length].astype("int64")
                )
                if length > 1:
                    output = model(
                        tokens[None, :-1],
                        torch.arange(length - 1)[None],
                        None,
                        labels=tokens[None, 1:],
                    )
                    found.append(output[0])
                else:
                    found.append(torch.empty(0))
    return found
