"""What a run's settings mean on its number of ranks, said before it starts; no reason to refuse."""

from __future__ import annotations

from mellum2_megatron.config import Run
from mellum2_megatron.planning.dense_shards import dense_shards_note
from mellum2_megatron.planning.gpus import BEFORE_HOPPER, Machine


def start_notes(run: Run, world_size: int, gpu: Machine | None = None) -> list[str]:
    """Return remarks about a run, one line each.

    Args:
        run: a resolved run.
        world_size: number of ranks, which the layout divides.
        gpu: the card of each rank, where it is another machine's; default none.
    """
    loss, ranks = run.loss, run.layout.data_parallel(world_size)
    notes = []
    if (
        loss.aux_loss_type == "global_aux_loss"
        and loss.aux_loss_gradient == "megatron"
        and loss.aux_loss_coef
        and ranks > 1
    ):
        notes.append(
            f"balancing of experts: on {ranks} data-parallel ranks loss.aux_loss_coef="
            f"{loss.aux_loss_coef:g} acts like {loss.aux_loss_coef / ranks:.2g} on one rank "
            "(loss.aux_loss_gradient=megatron, docs/layouts.md)"
        )
    if (
        gpu is not None
        and run.execution.deterministic
        and run.resolved_backend("cuda") == "te"
        and BEFORE_HOPPER.search(gpu.label)
    ):
        # The packages of another machine are not known here.
        notes.append(
            f"execution.deterministic=true on {gpu.label}: the nodes need flash-attn 2, and "
            "layout.cp=1 where documents are kept apart; each node looks before its ranks start"
        )
    if note := dense_shards_note(run, world_size):
        notes.append(note)
    return notes
