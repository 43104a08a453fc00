"""Old path of `mellum2_megatron.planning.stage_chain`, shown by earlier pages."""

from mellum2_megatron.planning.stage_chain import check_predecessor, stage_chain

__all__ = ["check_predecessor", "stage_chain"]
