"""The model itself: Megatron's `GPTModel` with Mellum 2's specs, for `pretrain` or on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mellum2_megatron.model.chunked_head import Mellum2Model
from mellum2_megatron.model.initial_weights import draw_by_name
from mellum2_megatron.model.layer_specs import decoder_block_spec, mtp_block_spec
from mellum2_megatron.model.muon_attributes import mark_parameters
from mellum2_megatron.model.router import configure_routers
from mellum2_megatron.model.router_variants import enable_router_bias
from mellum2_megatron.model.transformer_config import (
    keep_mtp_projection_in_bf16,
    require_matching_config,
    transformer_config,
    use_plain_initialization,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mellum2_megatron.architecture import Mellum2Architecture
    from mellum2_megatron.config import Backend, Loss, Optimizer, Precision, Run


def build_model(
    architecture: Mellum2Architecture,
    *,
    backend: Backend,
    config: TransformerConfig | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    parallel_output: bool = False,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    **config_overrides: Any,
) -> Mellum2Model:
    """Build Mellum 2, or this rank's part of it.

    Torch distributed and Megatron's parallel state must be initialised. The model's forward pass
    takes token ids and positions `[b, s]` and returns logits `[b, s, v]`, or with labels `[b, s]`
    the loss of each token `[b, s]`.

    Args:
        architecture: the model's description.
        backend: "te" for Transformer Engine's modules, "torch" for plain ones.
        config: Megatron's configuration; derived from the architecture if None.
        pre_process: true if this pipeline stage holds the embedding.
        post_process: true if this pipeline stage holds the output head.
        parallel_output: leave the logits split over tensor-parallel ranks, `[b, s, v / tp]`.
        vp_stage: virtual pipeline stage, or None without virtual stages.
        pg_collection: process groups; Megatron's global ones if None.
        **config_overrides: fields for the derived configuration.

    Raises:
        InputError: `config` describes another model, or the backend is not installed.
        TypeError: overrides beside a `config`.
    """
    if config is None:
        config = transformer_config(architecture, **config_overrides)
    elif config_overrides:
        raise TypeError(f"config_overrides {sorted(config_overrides)} have no effect beside config")
    require_matching_config(config, architecture)
    return Mellum2Model(
        config=config,
        transformer_layer_spec=decoder_block_spec(architecture, backend, config, vp_stage=vp_stage),
        mtp_block_spec=mtp_block_spec(architecture, backend, config, vp_stage=vp_stage),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        # Each layer replaces these angles by its own and reads only their number.
        rotary_base=int(architecture.rope_sliding_attention.rope_theta),
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def model_provider(
    architecture: Mellum2Architecture,
    backend: Backend,
    optimizer: Optimizer | None = None,
    *,
    loss: Loss | None = None,
    precision: Precision | None = None,
    seed_by_name: int | None = None,
) -> Callable[..., Mellum2Model]:
    """Return the `model_provider` of Megatron's `pretrain`, called for each (virtual) stage.

    Args:
        architecture: the model's description.
        backend: "te" for Transformer Engine's modules, "torch" for plain ones.
        optimizer: optimizer settings, which choose the weights that Muon updates; Megatron's choice
            if None.
        loss: loss settings, read only for those without a Megatron argument; Megatron's defaults
            if None.
        precision: precision settings, read likewise; Megatron's defaults if None.
        seed_by_name: seed of initial weights by name; Megatron's order if None.
    """

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: Any = None,
    ) -> Mellum2Model:
        if config is None:
            from megatron.training import get_args
            from megatron.training.arguments import core_transformer_config_from_args

            config = core_transformer_config_from_args(get_args())
        # Modules read the configuration when they are built: change it before that.
        use_plain_initialization(config)
        if loss is not None and loss.bias_update_rate:
            enable_router_bias(config, loss.bias_update_rate)
        if precision is not None and precision.bf16_mtp_projection:
            keep_mtp_projection_in_bf16(config)
        model = build_model(
            architecture,
            backend=backend,
            config=config,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,  # Megatron's cross entropy takes logits `[s, b, v / tp]`
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        if optimizer is not None:
            mark_parameters(model, optimizer)
        if loss is not None:
            configure_routers(model, loss)
            model.chunk_heads(loss.head_chunk)
        if seed_by_name is not None:
            draw_by_name(model, config, seed_by_name)
        return model

    return provide


def run_model_provider(
    run: Run, backend: Backend, *, new: bool = True
) -> Callable[..., Mellum2Model]:
    """Return the `model_provider` of a run's model, with its optimizer, loss and precision.

    Args:
        run: the run.
        backend: implementation of the layers.
        new: true (default) if the run keeps its initial weights, false if it loads others.
    """
    return model_provider(
        run.architecture,
        backend,
        run.optimizer,
        loss=run.loss,
        precision=run.precision,
        seed_by_name=run.seed if new and run.seed_weights == "by_name" else None,
    )
