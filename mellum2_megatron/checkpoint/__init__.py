"""A run on disk: folder, manifest, run.yaml, saves, and the checkpoint that a run starts from."""

from mellum2_megatron.checkpoint.checks import check_run_folder
from mellum2_megatron.checkpoint.folder import CheckpointFolder, find_checkpoint
from mellum2_megatron.checkpoint.run_folder import output_folder, read_run, write_run_folder
from mellum2_megatron.checkpoint.starting_point import StartingPoint

__all__ = [
    "CheckpointFolder",
    "StartingPoint",
    "check_run_folder",
    "find_checkpoint",
    "output_folder",
    "read_run",
    "write_run_folder",
]
