"""Rollouts by a vLLM server, which reads new weights from its model folder.

Start the server with ``VLLM_SERVER_DEV_MODE=1``, or it has no way to reload (vllm/entrypoints/
serve/rlhf, 0.32). Each step the weights are written over the folder's, then the server is told to
read them and to forget what it has cached of the old ones.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.live_weights import write_hf_weights
from mellum2_megatron.common.errors import WorkError, first_line
from mellum2_megatron.common.json_files import parse_object
from mellum2_megatron.rollouts.engine import Prompt, Sampled, check_sampled

if TYPE_CHECKING:
    import torch

    from mellum2_megatron.architecture import Mellum2Architecture

_AT_ONCE = 64
"""Requests that wait for the server at a time; it batches them itself."""


class VllmEngine:
    """A vLLM server.

    Args:
        url: its address, ``http://HOST:PORT``.
        folder: its model folder, to which rank 0 writes the weights.
        architecture: the model.
        ends: tokens that end an answer.
        writes: true on the rank that writes the weights and has them reloaded.
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
        timeout: float = 3600.0,
    ) -> None:
        self._url, self._folder, self._architecture = url.rstrip("/"), folder, architecture
        self._ends, self._writes, self._timeout = sorted(ends), writes, timeout
        self._name: str | None = None

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the weights and have the server read them; see `Engine.load`."""
        if not self._writes:
            return
        write_hf_weights(self._folder, weights, self._architecture)
        self._ask("/collective_rpc", {"method": "reload_weights"})
        self._ask("/reset_prefix_cache", {})

    def write(
        self, prompts: Sequence[Prompt], *, answers: int, max_tokens: int
    ) -> list[list[Sampled]]:
        """Return sampled answers; see `Engine.write`."""
        if self._name is None:
            self._name = str(self._ask("/v1/models", None)["data"][0]["id"])

        def ask(prompt: Prompt) -> list[Sampled]:
            reply = self._ask(
                "/v1/completions",
                {
                    "model": self._name,
                    "prompt": list(prompt.tokens),
                    "n": answers,
                    "max_tokens": max_tokens,
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": -1,
                    "seed": prompt.seed % 2**31,
                    "logprobs": 0,
                    "stop_token_ids": self._ends,
                    "return_token_ids": True,
                    "skip_special_tokens": False,
                },
            )
            return [self._sampled(prompt, choice) for choice in reply["choices"]]

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(ask, prompts))

    def _sampled(self, prompt: Prompt, choice: Mapping[str, Any]) -> Sampled:
        try:
            values = choice["logprobs"]["token_logprobs"]
            one = Sampled(
                tokens=tuple(int(token) for token in choice["token_ids"]),
                log_probabilities=tuple(
                    float("nan") if value is None else float(value) for value in values
                ),
                ended=choice["finish_reason"] == "stop",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WorkError(
                f"{self._url}: a reply without tokens and log-probabilities ({first_line(error)})",
                fix="use a vLLM that knows return_token_ids (docs/rlvr.md)",
            ) from error
        check_sampled(prompt.place, one)
        return one

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the server's reply, an empty one as an empty object.

        Raises:
            WorkError: it cannot be reached, or refuses.
        """
        request = urllib.request.Request(
            self._url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            detail = error.read(500).decode("utf-8", "replace").strip()
            fix = "look at its log"
            if error.code == 404 and not path.startswith("/v1"):
                fix = "start it with VLLM_SERVER_DEV_MODE=1, so that it can reload weights"
            raise WorkError(f"{self._url}{path}: HTTP {error.code} {detail}", fix=fix) from error
        except (OSError, ValueError) as error:
            raise WorkError(
                f"{self._url}{path}: the engine is gone ({first_line(error)})",
                fix="start it again; the run resumes from its last checkpoint",
            ) from error
        return parse_object(content) if content.strip() else {}
