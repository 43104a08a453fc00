"""Training: `rank_main`, the main of every rank, and `loop`, a run in Megatron's `pretrain`."""
