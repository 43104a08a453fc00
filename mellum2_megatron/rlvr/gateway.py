"""The rewards as a small HTTP service, so that other trainers and machines can ask for them.

``POST /score`` takes ``{"items": [{"verifier", "arguments", "tools", "answer", "thinking"}, ...]}``
and returns ``{"verdicts": [{"reward", "reason"}, ...]}`` in the same order. ``GET /health`` returns
``{"waiting": N, "most": M}``: the items at work or waiting, and how many there may be.

What is more than that is refused with 503 and ``Retry-After``, and nothing of such a request is
begun. 400: an item cannot be used; 401: the token is wrong; 408: the request does not come to its
end; 413: it is too large; 500: a verifier failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellum2_megatron.common.errors import WorkError, shown
from mellum2_megatron.common.json_files import JsonError, parse_object
from mellum2_megatron.data.chat.records import RecordError, parse_prompt
from mellum2_megatron.rlvr.rewards.verdict import Answer, ArgumentsError, Verdict, take
from mellum2_megatron.rlvr.rewards.verifiers import VERIFIERS, find_verifier, require_thinking

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LARGEST_REQUEST, MOST_BYTES = 64 << 20, 1 << 30
"""Bytes of the largest request, and of all that are read or wait for their answers."""
BODY_S = 60.0
"""Seconds that a request's next part may take: a client may be gone without a word."""

_KINDS = {
    "verifier": (str,),
    "arguments": (dict,),
    "tools": (list,),
    "answer": (str,),
    "thinking": (bool,),
}
# Found once, checked once: a group of answers has one task.
_REMEMBERED, _LARGEST_REMEMBERED = 4096, 1 << 16


class TooLargeError(Exception):
    """A request of more than `LARGEST_REQUEST`."""


class TooMuchError(Exception):
    """Requests of more than `MOST_BYTES` together."""


class Gateway:
    """Scores items with a bounded number of them at work or waiting.

    Args:
        workers: items that are scored at a time.
        most: items at work or waiting, at most.
        own: names of the functions of one's own (``FILE.py:FUNCTION``) that may be asked for. A
            file that a request names freely would be executed.
        folder: folder that their files are named from.
        token: secret that requests must bring (``Authorization: Bearer TOKEN``); None: none.
    """

    def __init__(
        self, *, workers: int, most: int, own: frozenset[str], folder: Path, token: str | None
    ) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="score")
        self._most, self._own, self._folder, self._token = most, own, folder, token
        self._waiting = self._bytes = 0
        self._check = functools.lru_cache(_REMEMBERED)(self._check_once)

    def application(self) -> Starlette:
        """Return the ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        return Starlette(
            routes=[
                Route("/score", self._score, methods=["POST"]),
                Route("/health", self._health, methods=["GET"]),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: Starlette) -> AsyncIterator[None]:
        """Begin nothing more at the end."""
        yield
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _health(self, request: Request) -> Response:
        return _answer(200, {"waiting": self._waiting, "most": self._most})

    async def _score(self, request: Request) -> Response:
        given = request.headers.get("authorization", "")
        if self._token is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {self._token}".encode()
        ):
            return _answer(401, {"error": "the token is missing or wrong"})
        body = bytearray()
        try:
            return await self._answer_to(request, body)
        finally:
            self._bytes -= len(body)

    async def _answer_to(self, request: Request, body: bytearray) -> Response:
        """Read a request into ``body``, score its items, and return the answer."""
        try:
            parts = request.stream()
            # `anext` of a stream that ends raises, so the end is a part without content.
            while part := await asyncio.wait_for(anext(parts, b""), BODY_S):
                body += part
                self._bytes += len(part)
                if len(body) > LARGEST_REQUEST:
                    raise TooLargeError
                if self._bytes > MOST_BYTES:
                    raise TooMuchError
            items = _items(bytes(body))
        except TimeoutError:
            return _answer(408, {"error": f"nothing more of the request for {BODY_S:g} s"})
        except TooMuchError:
            return _busy(f"requests of {MOST_BYTES:,} bytes are waiting")
        except TooLargeError:
            return _answer(413, {"error": f"a request has {LARGEST_REQUEST:,} bytes at most"})
        except ArgumentsError as error:
            return _answer(400, {"error": str(error)})
        if len(items) > self._most:
            fix = "divide it, or start the service with a larger --queue"
            return _answer(413, {"error": f"a request has {self._most:,} items at most: {fix}"})
        if self._waiting + len(items) > self._most:
            return _busy(f"{self._waiting:,} items are waiting, {self._most:,} at most")
        # Both lines run without a break: the event loop has one thread.
        self._waiting += len(items)
        work = [self._submit(item) for item in items]
        said = await asyncio.gather(*work, return_exceptions=True)
        for number, one in enumerate(said):
            if isinstance(one, BaseException):
                code = 400 if isinstance(one, ArgumentsError) else 500
                why = one.what if isinstance(one, WorkError) else str(one)
                return _answer(code, {"error": f"item {number}: {why}"})
        verdicts = [
            {"reward": one.reward, "reason": one.reason} for one in said if isinstance(one, Verdict)
        ]
        return _answer(200, {"verdicts": verdicts})

    def _submit(self, item: Mapping[str, Any]) -> asyncio.Future[Verdict]:
        """Hand an item to the threads; it stops counting as waiting when it is done."""
        loop = asyncio.get_running_loop()
        future = self._pool.submit(self._score_one, item)
        # On the threads' own future: one of a client that has gone is cancelled too early.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        return asyncio.wrap_future(future)

    def _done(self) -> None:
        self._waiting -= 1

    def _score_one(self, item: Mapping[str, Any]) -> Verdict:
        arguments, tools = item.get("arguments", {}), item.get("tools", [])
        task = {"verifier": item["verifier"], "arguments": arguments, "tools": tools}
        text = json.dumps(task, sort_keys=True)
        # Tasks may be as large as a request, and 4,096 of those are more than a machine's memory.
        check = self._check if len(text) <= _LARGEST_REMEMBERED else self._check_once
        described = check(text)
        verifier = find_verifier(item["verifier"], self._folder)
        thinking = item.get("thinking", False)
        require_thinking(item["verifier"], arguments, thinking=thinking)
        answer = Answer(text=item["answer"], thinking=thinking)
        return verifier.score(answer, arguments, described)

    def _check_once(self, task: str) -> tuple[dict[str, Any], ...]:
        """Check a task as a file of tasks does, and return its tools."""
        row = parse_object(task)
        for name in _names(row):
            if name not in (*VERIFIERS, "all") and name not in self._own:
                raise ArgumentsError(
                    f"the verifier {shown(name)} is not offered; offered: "
                    + ", ".join([*VERIFIERS, "all", *sorted(self._own)])
                )
        asked = {"messages": [{"role": "user", "content": "?"}], "tools": row["tools"]}
        try:
            tools = parse_prompt(asked).tools
        except RecordError as error:
            raise ArgumentsError(str(error)) from None
        find_verifier(row["verifier"], self._folder).check(row["arguments"], tools)
        return tools


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a task's verifier and of those inside it."""
    yield str(row.get("verifier"))
    parts = row.get("arguments", {}).get("of", []) if row.get("verifier") == "all" else []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, Mapping):
            yield str(part.get("verifier"))


def _items(body: bytes) -> list[dict[str, Any]]:
    try:
        request = parse_object(body)
    except JsonError as error:
        raise ArgumentsError(str(error)) from None
    take(request, {"items": (list,)}, required=["items"])
    for number, item in enumerate(request["items"]):
        if not isinstance(item, dict):
            raise ArgumentsError(f"item {number} is no object")
        try:
            take(item, _KINDS, required=["verifier", "answer"])
        except ArgumentsError as error:
            raise ArgumentsError(f"item {number}: {error}") from None
    return list(request["items"])


def _busy(error: str) -> Response:
    return _answer(503, {"error": error}, {"Retry-After": "1"})


def _answer(
    code: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(dict(content), status_code=code, headers=dict(headers or {}))
