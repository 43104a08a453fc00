"""Old path, promised by docs/stages.md: the module is now
`mellum2_megatron.planning.stage_chain`."""

from mellum2_megatron.planning.stage_chain import check_predecessor, stage_chain

__all__ = ["check_predecessor", "stage_chain"]
