"""What of an ablation's checkpoint Hugging Face's `MellumForCausalLM` can hold."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from mellum2_megatron.architecture.hf_config import require_hf_form
from mellum2_megatron.checkpoint import CheckpointFolder, read_run
from mellum2_megatron.checkpoint.run_folder import checkpoint_run_file
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.config import Run

if TYPE_CHECKING:
    # Loads torch, which a study that is only planned does not need.
    from conversion.torch_dist.reader import TorchDistReader

logger = logging.getLogger(__name__)

ROUTER_BIAS = ".router.expert_bias"
"""End of the Megatron key of a router's bias, a tensor of runs with `loss.bias_update_rate`."""

_BIAS_RULE = (
    "MellumForCausalLM chooses experts by their scores alone, so without this bias it would choose "
    "others"
)
_BIAS_FIX = "use `mellum2 score` on the checkpoint, or train without loss.bias_update_rate"


def require_exportable_run(run: Run) -> None:
    """Refuse a run whose checkpoints `require_exportable` would refuse; it need not be trained.

    Raises:
        InputError: a model that `MellumForCausalLM` cannot hold, or a bias on the routers' scores.
    """
    require_hf_form(run.architecture)
    if run.loss.bias_update_rate:
        raise InputError(
            f"loss.bias_update_rate={run.loss.bias_update_rate:g}", rule=_BIAS_RULE, fix=_BIAS_FIX
        )


def require_exportable(checkpoint: CheckpointFolder, reader: TorchDistReader) -> None:
    """Refuse a checkpoint that would compute something else in transformers.

    Warn if only its training did: with `loss.capacity_factor` tokens were dropped, in transformers
    none is.

    Raises:
        InputError: a model that `MellumForCausalLM` cannot hold, or a bias on the routers' scores,
            which decides the choice of experts.
    """
    require_hf_form(checkpoint.architecture)
    if biased := sorted(key for key in reader.tensors if key.endswith(ROUTER_BIAS)):
        raise InputError(
            f"{checkpoint.iteration_dir}: {biased[0]}",
            rule=_BIAS_RULE,
            fix=_BIAS_FIX,
        )
    file = checkpoint_run_file(checkpoint.root, checkpoint.iteration)
    capacity = None
    if file is not None:
        # The weights are whole without it, so a damaged run file is no reason to refuse them.
        with contextlib.suppress(InputError):
            capacity = read_run(file, warn=False).loss.capacity_factor
    if capacity is not None:
        logger.warning(
            "%s was trained with loss.capacity_factor=%g; transformers drops no token, so its "
            "outputs differ from the run's where an expert was full",
            checkpoint.iteration_dir,
            capacity,
        )
