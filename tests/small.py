"""A model that trains in seconds, as overrides of the tiny recipe."""

SMALL_MODEL = [
    "architecture.vocab_size=384",
    "architecture.hidden_size=64",
    "architecture.head_dim=16",
    "architecture.moe_intermediate_size=32",
    "architecture.num_experts=4",
    "architecture.sliding_window=16",
    "data.sequence_length=64",
    "schedule.micro_batch_size=2",
    "schedule.warmup_samples=4",
    "logging.log_interval=1",
]
