"""Rollouts by a vLLM server, which takes each step's weights from a folder.

The weights are written over the folder's, then the server reads them: while it runs, or by a new
start (`Rl.hand_over`). All ranks ask one server, and it must see the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from conversion.live_weights import write_hf_weights
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.rollouts.engine import Prompt, Sampled, check_sampled
from mellum2_megatron.serving.client import Sampling, ServerGoneError, VllmClient
from mellum2_megatron.serving.server import VllmServer

if TYPE_CHECKING:
    import torch

    from mellum2_megatron.architecture import Mellum2Architecture

_AT_ONCE = 64
"""Requests that wait for the server at a time; it batches them itself."""


class VllmEngine:
    """A vLLM server.

    Args:
        url: its address, ``http://HOST:PORT``.
        folder: folder to which the weights are written.
        architecture: the model.
        ends: tokens that end an answer.
        writes: true on the rank that writes the weights and hands them over.
        server: the server, on that rank, if the run starts it; None (default): it runs already.
        timeout: seconds that a request may take, default an hour.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        architecture: Mellum2Architecture,
        ends: Sequence[int],
        *,
        writes: bool,
        server: VllmServer | None = None,
        timeout: float = 3600.0,
    ) -> None:
        self._folder, self._architecture = folder, architecture
        self._ends, self._writes = tuple(sorted(ends)), writes
        self._server, self._started = server, False
        self._client = VllmClient(url, None, timeout=timeout)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the weights and have the server read them; see `Engine.load`."""
        if not self._writes:
            return
        write_hf_weights(self._folder, weights, self._architecture)
        if self._server is None:
            with self._explained():
                self._client.reload(self._folder)
        elif self._started:
            self._server.hand_over(self._folder)
        else:
            self._server.start()
            self._started = True

    def write(
        self, prompts: Sequence[Prompt], *, answers: int, max_tokens: int
    ) -> list[list[Sampled]]:
        """Return sampled answers; see `Engine.write`."""

        def ask(prompt: Prompt) -> list[Sampled]:
            sampling = Sampling(max_tokens=max_tokens, seed=prompt.seed % 2**31, stop=self._ends)
            return [
                Sampled(
                    tokens=one.tokens,
                    log_probabilities=one.log_probabilities,
                    ended=one.ended == "stop",
                )
                for one in self._client.sample(prompt.tokens, answers, sampling)
            ]

        with self._explained(), ThreadPoolExecutor(_AT_ONCE) as pool:
            written = list(pool.map(ask, prompts))
        for prompt, some in zip(prompts, written, strict=True):
            for one in some:
                check_sampled(prompt.place, one)
        return written

    def close(self) -> None:
        """End the server if the run has started it; see `Engine.close`."""
        if self._server is not None:
            self._server.stop()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what becomes of a run whose server is gone."""
        try:
            yield
        except ServerGoneError as error:
            raise WorkError(
                f"the engine is gone: {error.what}",
                fix="see its log, and start it again; the run resumes from its last checkpoint",
            ) from error
