"""A client of vLLM's server: token ids in, token ids and log-probabilities out.

vLLM's names, read and run at 0.32: ``/v1/completions`` with ``return_token_ids``, ``/metrics``
with its counts of drafts, and, in its development mode, ``/server_info``, ``/collective_rpc`` and
``/reset_prefix_cache`` for new weights.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mellum2_megatron.common.errors import InputError, WorkError, first_line
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.serving.command import CPU_WORKER

_MOST_AT_ONCE = 256
"""Connections of one call; vLLM itself queues what is more than it can batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Every value goes into every request: vLLM would take those that are left out from the folder's
    generation_config.json.

    Attributes:
        max_tokens: most tokens of an answer.
        temperature: 0 is greedy; default 1.
        top_p: share of the probability that is kept, default 1: all.
        top_k: tokens that are kept, default 0: all.
        seed: seed of one answer; None (default): the server's own. With several prompts, prompt i
            has seed + i.
        ignore_end: go on after the end of the text, to ``max_tokens``; default False.
        stop: ids that end an answer, beside the model's own; default none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ignore_end: bool = False
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive_int("max_tokens", self.max_tokens)
        if self.temperature < 0:
            raise InputError(
                f"temperature={self.temperature}", rule="it must not be negative", fix="use 0 or 1"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}", rule="it lies in (0, 1]", fix="use 1")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}", rule="it must not be negative", fix="use 0")

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": self.seed,
            "ignore_eos": self.ignore_end,
            "stop_token_ids": list(self.stop),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        tokens: generated ids. The id that ended the text is the last one.
        log_probabilities: of each token, in nats, under the model's own distribution: temperature,
            top-p and top-k are not in it. NaN where the server gave none.
        ended: ``stop``: by an end of the text; ``length``: by ``max_tokens`` or the context.
        first_token: seconds from the request to the first token; None if not asked for.
        seconds: seconds from the request to the end.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    ended: Literal["stop", "length"]
    first_token: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftCounts:
    """Tokens that a draft has proposed, and those kept, since the server started."""

    drafted: int
    accepted: int


class VllmClient:
    """Asks a server.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        model: the model's name there; None: the first that the server names.
        token: secret of ``--api-key``; None (default): none.
        timeout: longest wait for the next bytes of an answer, in seconds; default 600.

    Raises:
        InputError: the URL is not of that form.
    """

    def __init__(
        self, url: str, model: str | None, *, token: str | None = None, timeout: float = 600.0
    ) -> None:
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or host is None:
            raise InputError(
                f"url {url}", rule="it is no address", fix="write http://127.0.0.1:8000"
            )
        self._secure, self._host, self._port = parts.scheme == "https", host, port
        self._prefix = parts.path.rstrip("/")
        self.url, self._model, self._timeout = url, model, timeout
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, timed: bool = False
    ) -> list[Completion]:
        """Return an answer to each prompt, in order; all are asked at once.

        Args:
            prompts: token ids, none of them empty.
            sampling: how tokens are chosen.
            timed: also take the time of each first token, which needs a stream; default False.

        Raises:
            WorkError: the server does not answer, refuses a request, or answers in another form.
        """
        requests = [
            replace(sampling, seed=None if sampling.seed is None else sampling.seed + number)
            for number in range(len(prompts))
        ]
        ask = self._timed if timed else self._whole
        with ThreadPoolExecutor(max(1, min(len(prompts), _MOST_AT_ONCE))) as pool:
            return list(pool.map(ask, prompts, requests))

    def sample(self, prompt: Sequence[int], answers: int, sampling: Sampling) -> list[Completion]:
        """Return several answers to one prompt; answer i has the seed ``sampling.seed`` + i.

        Args:
            prompt: token ids.
            answers: number of answers.
            sampling: how tokens are chosen.

        Raises:
            WorkError: as for `complete`.
        """
        start = time.perf_counter()
        content = self._send(
            "POST", "/v1/completions", self._body(prompt, sampling) | {"n": answers}
        )
        seconds = time.perf_counter() - start
        choices = self._choices(content, answers)
        return [self._completion([choice], None, seconds) for choice in choices]

    def is_up(self) -> bool:
        """Return true if the server has loaded its model and answers."""
        try:
            self._send("GET", "/health")
        except WorkError:
            return False
        return True

    def draft_counts(self) -> DraftCounts | None:
        """Return the counts of the draft; None of a server without one."""
        text = self._send("GET", "/metrics").decode("utf-8", "replace")

        def total(name: str) -> int | None:
            values = re.findall(rf"^vllm:{name}_total\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
            return int(sum(map(float, values))) if values else None

        drafted = total("spec_decode_num_draft_tokens")
        accepted = total("spec_decode_num_accepted_tokens")
        if drafted is None or accepted is None:
            return None
        return DraftCounts(drafted=drafted, accepted=accepted)

    def reload(self, folder: Path) -> None:
        """Give the server the weights of another folder of the same architecture.

        It must run with `command.reload_switches`. Requests at work would go on with the new
        weights: send none meanwhile. The MTP head of a server that drafts keeps its old weights,
        which costs accepted drafts and no exactness.

        Args:
            folder: Hugging Face folder, readable by the server.

        Raises:
            WorkError: the server cannot take new weights, or could not load them.
        """
        path = {"weights_path": str(folder.absolute())}
        call = {"method": self._reload_method(), "kwargs": path}
        self._send("POST", "/collective_rpc", call)
        # What it remembers of earlier prompts was computed by the old weights.
        self._send("POST", "/reset_prefix_cache", {})

    def _reload_method(self) -> str:
        """Return the worker's method that reads new weights; it depends on the server's device.

        Raises:
            WorkError: the server has none that works.
        """
        try:
            content = self._send("GET", "/server_info?config_format=json")
        except _StatusError as error:
            if error.status != 404:
                raise
            raise WorkError(
                f"the server at {self.url} takes no new weights",
                fix="start it in vLLM's development mode: mellum2 serve FOLDER --reloadable",
            ) from None
        try:
            config = parse_object(content)["vllm_config"]
            device = str(config["device_config"]["device"])
            extension = config["parallel_config"]["worker_extension_cls"]
        except (JsonError, KeyError, TypeError):
            raise self._strange(content) from None
        if device != "cpu":
            return "reload_weights"
        if extension != CPU_WORKER:
            # It would say that it did, and answer wrongly (inside_vllm/mellum2_vllm_worker.py).
            raise WorkError(
                f"the server at {self.url} runs on a CPU and would not pack its experts anew",
                fix="start it with mellum2 serve FOLDER --reloadable",
            )
        return "reload_packed_weights"

    def _whole(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        start = time.perf_counter()
        answer = self._send("POST", "/v1/completions", self._body(prompt, sampling))
        seconds = time.perf_counter() - start
        return self._completion(self._choices(answer, 1), None, seconds)

    def _timed(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        body = self._body(prompt, sampling) | {"stream": True}
        choices, first = [], None
        start = time.perf_counter()
        for line in self._lines("POST", "/v1/completions", body):
            if not line.startswith(b"data: ") or line[6:].strip() == b"[DONE]":
                continue
            (choice,) = self._choices(line[6:], 1)
            if first is None and choice.get("token_ids"):
                first = time.perf_counter() - start
            choices.append(choice)
        return self._completion(choices, first, time.perf_counter() - start)

    def _body(self, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self._name(),
            "prompt": list(prompt),
            "logprobs": 0,  # of the chosen tokens alone
            "return_token_ids": True,
            **sampling.fields(),
        }

    def _name(self) -> str:
        if self._model is None:
            content = self._send("GET", "/v1/models")
            try:
                self._model = str(parse_object(content)["data"][0]["id"])
            except (JsonError, KeyError, IndexError, TypeError):
                raise self._strange(content) from None
        return self._model

    def _choices(self, content: bytes, number: int) -> list[Mapping[str, Any]]:
        """Return the choices of an answer, or of a piece of a streamed one."""
        try:
            answer = parse_object(content)
        except JsonError:
            raise self._strange(content) from None
        if "error" in answer:  # a stream that fails has begun with status 200
            raise WorkError(
                f"the server at {self.url} failed: {json.dumps(answer['error'])[:300]}",
                fix="see its log",
            )
        match answer.get("choices"):
            case list(choices) if len(choices) == number:
                if all(isinstance(choice, dict) for choice in choices):
                    return choices
        raise self._strange(content)

    def _completion(
        self, choices: Sequence[Mapping[str, Any]], first: float | None, seconds: float
    ) -> Completion:
        tokens: list[int] = []
        values: list[float] = []
        for choice in choices:
            tokens += choice.get("token_ids") or []
            found = (choice.get("logprobs") or {}).get("token_logprobs") or []
            values += [math.nan if value is None else float(value) for value in found]
        ended = choices[-1].get("finish_reason") if choices else None
        if ended not in ("stop", "length") or len(values) != len(tokens):
            raise self._strange(json.dumps(choices[-1:]).encode())
        return Completion(
            tokens=tuple(tokens),
            log_probabilities=tuple(values),
            ended=ended,
            first_token=first,
            seconds=seconds,
        )

    def _strange(self, content: bytes) -> WorkError:
        return WorkError(
            f"the server at {self.url} answers in another form: "
            f"{content[:300].decode('utf-8', 'replace')}",
            fix="use vLLM 0.32 or later there",
        )

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        return b"".join(self._lines(method, path, body))

    def _lines(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[bytes]:
        """Send a request; yield the lines of the answer as they come."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._prefix + path, content, self._headers)
            response = connection.getresponse()
            if response.status >= 300:
                raise _StatusError(self.url, response.status, response.read(2000))
            yield from response
        except (OSError, http.client.HTTPException) as error:
            raise ServerGoneError(
                f"the server at {self.url} does not answer ({first_line(error)})",
                fix="see whether it runs, and its log",
            ) from error
        finally:
            connection.close()


class ServerGoneError(WorkError):
    """A server that cannot be reached, or that stops in the middle of an answer."""


class _StatusError(WorkError):
    """A request that the server refused."""

    def __init__(self, url: str, status: int, content: bytes) -> None:
        self.status = status
        try:
            found = parse_object(content).get("error")
            reason = str(found["message"] if isinstance(found, dict) else found or content)
        except (JsonError, KeyError):
            reason = content.decode("utf-8", "replace")
        super().__init__(
            f"the server at {url} answered {status}: {reason[:300]}", fix="see its log"
        )
