"""What a run tells the world: metrics.jsonl, TensorBoard, W&B, the console, plots. No torch."""

from mellum2_megatron.metrics.console import TrainingConsole
from mellum2_megatron.metrics.log import MetricsLogger, read_metrics
from mellum2_megatron.metrics.plots import plot_loss

__all__ = ["MetricsLogger", "TrainingConsole", "plot_loss", "read_metrics"]
