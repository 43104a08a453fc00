"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, console and plots; no torch at import."""

from mellum2_megatron.metrics.console import TrainingConsole
from mellum2_megatron.metrics.log import MetricsLogger, read_metrics
from mellum2_megatron.metrics.plots import plot_loss

__all__ = ["MetricsLogger", "TrainingConsole", "plot_loss", "read_metrics"]
