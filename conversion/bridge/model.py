"""Mellum 2's two classes for Megatron-Bridge 0.6.2.

The provider builds the model, the bridge fills it with weights. Import `conversion.bridge` instead
of this module: it registers both, and names a package that is missing.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

# Before megatron.bridge: it imports Transformer Engine, which needs torch's libraries loaded.
import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)

from conversion.bridge.mapping import mapping_registry
from conversion.huggingface.format import listed
from conversion.mapping import derive, huggingface_shapes
from mellum2_megatron.architecture import Mellum2Architecture, from_hf_config, to_hf_config
from mellum2_megatron.checkpoint.bridge_config import provider_fields
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.model.provider import build_model
from mellum2_megatron.model.transformer_config import (
    require_matching_config,
    use_plain_initialization,
)

logger = logging.getLogger(__name__)


@dataclass
class Mellum2ModelProvider(GPTModelProvider):
    """Bridge's provider of a Mellum 2 model, with this project's layers.

    The inherited fields are Megatron's configuration. They must describe the same model as
    ``architecture``, with one exception: `mtp_num_layers` of 0 or None leaves the MTP head out.

    Attributes:
        architecture: `Mellum2Architecture.to_dict()`, plain values for ``run_config.yaml``.
            `finalize` refuses None, the default.
    """

    architecture: dict[str, Any] | None = None

    @classmethod
    def from_architecture(
        cls, architecture: Mellum2Architecture, dtype: torch.dtype = torch.bfloat16
    ) -> Mellum2ModelProvider:
        """Return the provider of a model with weights of ``dtype``.

        Call `finalize` after the last change of its fields.
        """
        return cls(
            **provider_fields(architecture),
            activation_func=torch.nn.functional.silu,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
        )

    def finalize(self) -> None:
        """Complete the configuration; no field may change afterwards.

        Raises:
            InputError: there is no architecture, or the fields describe another model; the message
                names all differences.
        """
        architecture = self.built_architecture()
        if (
            self.architecture is not None
            and architecture.num_mtp_layers != self.architecture["num_mtp_layers"]
        ):
            logger.warning(
                "mtp_num_layers=%r: the model is built without its MTP head, and what is exported "
                "from it lacks mtp.*; set mtp_num_layers=%d to keep it",
                self.mtp_num_layers,
                self.architecture["num_mtp_layers"],
            )
        # YAML has no tuples: a window read from run_config.yaml is a list.
        window = vars(self)["window_size"]
        self.window_size = None if window is None else tuple(window)
        super().finalize()
        use_plain_initialization(self)
        require_matching_config(self, architecture)

    def built_architecture(self) -> Mellum2Architecture:
        """Return the architecture that `provide` builds, without an MTP head that is switched off.

        Raises:
            InputError: there is no architecture, or not a valid one.
        """
        if self.architecture is None:
            raise InputError(
                "Mellum2ModelProvider(architecture=None)",
                rule="its layers are built from it",
                fix="use Mellum2ModelProvider.from_architecture, or AutoBridge",
            )
        architecture = Mellum2Architecture.from_dict(self.architecture)
        return architecture if self.mtp_num_layers else architecture.replace(num_mtp_layers=0)

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build this rank's part of the model from Mellum 2's layer specs.

        Args:
            pre_process: True if the part holds the embedding; None: as the pipeline rank implies.
            post_process: True if the part holds the head; None: as the pipeline rank implies.
            vp_stage: virtual pipeline stage; None without virtual stages.

        Raises:
            InputError: the fields describe another model than ``architecture``, or Transformer
                Engine is missing.
        """
        stages = {"vp_stage": vp_stage, "vp_size": self.virtual_pipeline_model_parallel_size}
        if pre_process is None:
            pre_process = is_vp_first_stage(**stages) and is_pp_first_stage(self._pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(**stages) and is_pp_last_stage(self._pg_collection.pp)
        architecture = self.built_architecture()
        # Tensor parallelism splits the vocabulary's rows evenly.
        if self.should_pad_vocab:
            rows = calculate_padded_vocab_size(
                self.vocab_size, self.make_vocab_size_divisible_by, self.tensor_model_parallel_size
            )
            architecture = architecture.replace(vocab_size=rows)
        with torch.device("meta") if self.init_model_with_meta_device else nullcontext():
            return build_model(
                architecture,
                backend="te",
                config=self,
                pre_process=pre_process,
                post_process=post_process,
                parallel_output=self.parallel_output,
                vp_stage=vp_stage,
                pg_collection=self._pg_collection,
            )


@MegatronModelBridge.register_bridge(
    source="MellumForCausalLM", target=GPTModel, provider=Mellum2ModelProvider, model_type="mellum"
)
class Mellum2Bridge(MegatronModelBridge):
    """Conversion between a Hugging Face folder and a Megatron model in memory."""

    def provider_bridge(self, hf_pretrained: Any) -> Mellum2ModelProvider:
        """Return the provider for a Hugging Face model.

        Raises:
            InputError: its config is not that of a Mellum 2 model.
        """
        config = hf_pretrained.config
        dtype = self.dtype_from_hf(config, default=torch.bfloat16)
        return Mellum2ModelProvider.from_architecture(from_hf_config(config.to_dict()), dtype)

    @classmethod
    def megatron_to_hf_config(cls, provider: Mellum2ModelProvider) -> dict[str, Any]:
        """Return the ``config.json`` of a provider's model."""
        return to_hf_config(
            provider.built_architecture(), str(provider.params_dtype).removeprefix("torch.")
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the mapping of every weight, MTP included."""
        return mapping_registry()

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Return Bridge's conversion tasks, after a check that they are complete.

        Raises:
            InputError: a weight without a mapping, or a folder with missing or extra tensors.
        """
        # Bridge only logs a warning for a weight without a mapping or a tensor, and keeps the
        # weight's initial values (megatron/bridge/models/conversion/model_bridge.py:1725-1742,
        # 0.6.2). Extra tensors it ignores. A weight without a mapping has the task None.
        tasks: list[Any] = super().build_conversion_tasks(
            hf_pretrained, megatron_model, *args, **kwargs
        )
        parameters = self._megatron_global_param_names_all_pp_ranks(megatron_model)
        if unmapped := [name for name, task in zip(parameters, tasks, strict=True) if task is None]:
            raise InputError(
                f"{listed(unmapped)} of the Megatron model",
                rule="conversion.mapping has no row for it",
                fix="build the model with Mellum2ModelProvider",
            )
        # An export may be given a configuration instead of a folder: nothing to compare then.
        if hasattr(hf_pretrained, "state"):
            config = unwrap_model(megatron_model)[0].config
            if not isinstance(config, Mellum2ModelProvider):
                raise InputError(
                    f"a Megatron model configured by {type(config).__name__}",
                    rule="its architecture is not known",
                    fix="build it with Mellum2ModelProvider, or through AutoBridge",
                )
            # From the table and not from `tasks`: a rank has tasks for its own experts only.
            expected = set(huggingface_shapes(derive(config.built_architecture())))
            stored = set(hf_pretrained.state.source.get_all_keys())
            folder = getattr(hf_pretrained, "model_name_or_path", "the Hugging Face folder")
            _require_all(expected, stored, folder)
        return tasks


def _require_all(expected: set[str], stored: set[str], folder: object) -> None:
    """Raise InputError unless the folder has exactly the model's tensors.

    If the model was built without its MTP head, the folder's is ignored with a warning.
    """
    if missing := sorted(expected - stored):
        if any(name.endswith(".experts.gate_up_proj") for name in stored):
            fix = (
                "Bridge reads experts one by one: "
                "`mellum2 convert import` and `export` unfuse these"
            )
        else:
            fix = "give the complete folder; `mellum2 convert stitch-mtp` puts a lost MTP head back"
        raise InputError(
            f"{folder}: {listed(missing)} missing",
            rule="the Megatron model has a weight for it",
            fix=fix,
        )
    extra = sorted(stored - expected)
    built_without_head = not any(name.startswith("mtp.") for name in expected)
    if extra and built_without_head and all(name.startswith("mtp.") for name in extra):
        logger.warning(
            "%s: its MTP head is ignored: the Megatron model was built without one", folder
        )
    elif extra:
        raise InputError(
            f"{folder}: {listed(extra)} not part of the Megatron model",
            rule="every tensor of the folder is used",
            fix="give a folder whose config.json is its own",
        )
