"""Training and validation samples: Megatron's datasets over a prepared folder."""
