"""Client of the rewards' HTTP service (`rlvr.gateway`), with Python's own library alone.

It runs inside other trainers, whose environments lack this project's packages.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from typing import Any

from mellum2_megatron.common.errors import WorkError

ITEMS_OF_A_REQUEST = 64
REQUESTS_AT_A_TIME = 16
"""Together a quarter of the service's queue, so that several trainers can ask it."""

_LONGEST_WAIT = 10.0


class RewardClient:
    """Asks the service for rewards, again while it is full or out of reach.

    Args:
        url: ``http://HOST:PORT`` of the service.
        token: secret that requests bring; None: none.
        timeout_s: seconds for the answer to one request.
        patience_s: seconds over which a request is tried again.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float, patience_s: float
    ) -> None:
        self._url = f"{url.rstrip('/')}/score"
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s, self._patience_s = timeout_s, patience_s

    def score(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the reward of each item: a task's verifier and arguments, and an ``answer``.

        Raises:
            WorkError: the service refuses an item, failed, or was out of reach for too long.
        """
        parts = list(batched(items, ITEMS_OF_A_REQUEST))
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            return [reward for rewards in pool.map(self._request, parts) for reward in rewards]

    def _request(self, items: Sequence[Mapping[str, Any]]) -> list[float]:
        body = json.dumps({"items": list(items)}).encode()
        end = time.monotonic() + self._patience_s
        unreached = 0.5
        while True:
            request = urllib.request.Request(self._url, data=body, headers=self._headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                    return _rewards(response.read(), len(items))
            except urllib.error.HTTPError as error:
                said = error.read().decode("utf-8", "replace")[:500]
                fault = f"{error.code}: {said}"
                if error.code != 503:
                    raise WorkError(
                        f"the rewards' service at {self._url} answers {fault}",
                        fix="check the tasks with `mellum2 rl check`, and the service's log",
                    ) from None
                pause = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                fault = str(error) or type(error).__name__
                pause = unreached = min(2 * unreached, _LONGEST_WAIT)
            if time.monotonic() + pause > end:
                raise WorkError(
                    f"the rewards' service at {self._url} gave no rewards for "
                    f"{self._patience_s:g} s ({fault})",
                    fix="start `mellum2 rl serve`, or give it more --workers",
                )
            time.sleep(pause)


def _seconds(header: str | None) -> float:
    """Return the seconds of a Retry-After, 1 without one."""
    seconds = int(header) if header and header.isascii() and header.isdigit() else 1
    return min(float(seconds), _LONGEST_WAIT)


def _rewards(body: bytes, number: int) -> list[float]:
    """Return the rewards in an answer of the service.

    Raises:
        WorkError: it is no answer about ``number`` items.
    """
    try:
        rewards = [float(verdict["reward"]) for verdict in json.loads(body)["verdicts"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        rewards = []
    if len(rewards) != number:
        raise WorkError(
            f"an answer without {number} rewards", fix="name the address of `mellum2 rl serve`"
        )
    return rewards
