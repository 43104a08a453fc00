"""Checks of every tensor that is converted: SHA-256, finite values, overflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch

from conversion.huggingface.format import dtype_name
from conversion.jobs.weights_manifest import Manifest, WeightRecord
from mellum2_megatron.common.errors import InputError

logger = logging.getLogger(__name__)


class CheckedTensor(NamedTuple):
    """A tensor in the result's dtype.

    Attributes:
        tensor: tensor.
        record: its hash; None if the check needed none, or another dtype has changed the bytes.
    """

    tensor: torch.Tensor
    record: WeightRecord | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChecks:
    """Checks of the tensors that a conversion reads.

    Attributes:
        hashes: compare SHA-256 with the source's manifest, if it has one; default True.
        allow_nonfinite: convert NaN and infinite values with a warning; default False refuses
            them.
    """

    hashes: bool = True
    allow_nonfinite: bool = False

    def apply(
        self, name: str, tensor: torch.Tensor, *, manifest: Manifest | None, dtype: torch.dtype
    ) -> CheckedTensor:
        """Check a tensor as it was read, and return it in ``dtype``.

        Args:
            name: name in messages and in the manifest.
            tensor: tensor of the source.
            manifest: the source's manifest; None: compare no hash.
            dtype: dtype of the result; a tensor that has it is returned as it is, not copied.

        Raises:
            InputError: another hash than the manifest's, or values that are not finite.
        """
        record = None
        if manifest is not None:
            record = WeightRecord.of(name, tensor)
            manifest.check(record)
        self._require_finite(
            name, tensor, "weights must be finite", "use an earlier or another checkpoint"
        )
        if tensor.dtype == dtype:
            return CheckedTensor(tensor, record)
        converted = tensor.to(dtype)
        # float16 ends at 65,504: a finite weight may overflow on conversion. With allow_nonfinite
        # the values of the source were reported above.
        if not self.allow_nonfinite:
            rule = f"they overflow {dtype_name(dtype)}"
            self._require_finite(name, converted, rule, "convert to bfloat16 or float32")
        return CheckedTensor(converted, None)

    def _require_finite(self, name: str, tensor: torch.Tensor, rule: str, fix: str) -> None:
        # One pass without a mask of the tensor's size: NaN propagates through min and max.
        low, high = torch.aminmax(tensor)
        if torch.isfinite(low) and torch.isfinite(high):
            return
        count = int((~torch.isfinite(tensor)).sum())
        problem = f"tensor {name!r} has {count} of {tensor.numel()} values NaN or infinite"
        if not self.allow_nonfinite:
            raise InputError(
                problem, rule=rule, fix=f"{fix}, or pass --allow-nonfinite to convert it as it is"
            )
        logger.warning("%s", problem)
