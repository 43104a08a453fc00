"""transformers as an engine whose requests are timed, on the CPU in float32."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from conversion.huggingface.generation import watch_drafts
from conversion.huggingface.scoring import load_hf
from mellum2_megatron.architecture import Mellum2Architecture, to_hf_config
from mellum2_megatron.common.errors import InputError, WorkError
from mellum2_megatron.evaluation.inference import Answer


class TransformersEngine:
    """`mellum2_megatron.evaluation.inference.Engine`, by ``generate``.

    Args:
        main, mtp: models of `load_hf`; ``mtp`` None: without a draft.
        use_mtp: draft with ``mtp``, one request at a time.

    Raises:
        InputError: a draft is asked of a model without a head.
    """

    def __init__(self, main: Any, mtp: Any | None, *, use_mtp: bool) -> None:
        if use_mtp and mtp is None:
            raise InputError("--use-mtp", rule="the model has no MTP head", fix="leave it out")
        self._main, self._mtp, self._use_mtp = main, mtp, use_mtp

    @torch.no_grad()
    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Answer requests of equal length as one batch; see `Engine`.

        Raises:
            WorkError: transformers took no draft.
        """
        if self._use_mtp and len(prompts) > 1:
            raise InputError(
                "--use-mtp --mode throughput",
                rule="transformers drafts for one request at a time",
                fix="use --mode sync, or --engine vllm",
            )
        tokens = torch.tensor(prompts)
        clock = _Clock()
        plain = self._main._get_candidate_generator
        drafts = watch_drafts(self._main, self._mtp) if self._use_mtp else None
        start = time.perf_counter()
        try:
            ids = self._main.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                min_new_tokens=new_tokens,  # no end-of-text: all answers have one length
                max_new_tokens=new_tokens,
                use_mtp=self._use_mtp,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=0,  # unused: all prompts have one length
                streamer=clock,
            )
        finally:
            self._main._get_candidate_generator = plain
        seconds = time.perf_counter() - start
        if drafts is not None and not drafts.steps:
            raise WorkError("transformers took no draft from the MTP head", fix="use 5.23")
        return [
            Answer(
                first_token=clock.first - start,
                seconds=seconds,
                tokens=new_tokens,
                output=tuple(row[len(prompts[0]) :].tolist()),
                drafted=drafts.drafted if drafts is not None else None,
                accepted=drafts.accepted if drafts is not None else None,
            )
            for row in ids
        ]


class _Clock:
    """A streamer that notes when the first generated token comes.

    ``generate`` gives it the prompt first, then tokens as they are chosen.
    """

    def __init__(self) -> None:
        self.first = 0.0
        self._calls = 0

    def put(self, _tokens: Any) -> None:
        """Note a call."""
        self._calls += 1
        if self._calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Do nothing at the end of a text."""


def transformers_engines(
    hf_path: str,
    *,
    use_mtp: bool,
    dense: Mellum2Architecture | None,
) -> dict[str, TransformersEngine]:
    """Return the arms of a comparison: the model, with its draft, and a dense one.

    Args:
        hf_path: Hugging Face folder.
        use_mtp: add the arm with the draft.
        dense: shape of a dense model to add, its weights random; None: none.
    """
    main, mtp = load_hf(hf_path)
    engines = {"plain": TransformersEngine(main, None, use_mtp=False)}
    if use_mtp:
        engines["mtp"] = TransformersEngine(main, mtp, use_mtp=True)
    if dense is not None:
        engines["dense"] = TransformersEngine(random_model(dense), None, use_mtp=False)
    return engines


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return int(kilobytes * 1024)


def random_model(architecture: Mellum2Architecture) -> Any:
    """Return transformers' model of a shape, with random weights in float32 on the CPU."""
    from transformers import MellumConfig, MellumForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = MellumConfig(**to_hf_config(architecture))
        config._attn_implementation = "sdpa"
        config._experts_implementation = "eager"
        return MellumForCausalLM(config).float().eval()
