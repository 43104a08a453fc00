"""Settings of reinforcement learning (``data.feed=rollouts``), beside those of the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from mellum2_megatron.common.errors import shown
from mellum2_megatron.common.field_checks import (
    check_fields,
    require,
    require_not_negative,
    require_path,
    require_positive,
)
from mellum2_megatron.config.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class Rl:
    """How answers are written, judged and learnt from; without meaning for other feeds.

    Answers are sampled from the model's own distribution (temperature 1, all tokens), so that the
    log-probabilities of generation and training belong to the same one.

    Attributes:
        objective: loss, advantage, groups and penalties, see `Objective`.
        engine: writer of the answers. ``transformers`` (default): a copy of the model in each rank,
            for small models. ``vllm``: a server at ``url``, or one of ``server_python``.
        url: ``http://HOST:PORT`` of a vLLM server that runs already; None (default): none.
        server_python: Python of an environment with vLLM. The run starts the server itself, for
            ranks on one machine; None (default): it does not.
        hand_over: how the server takes new weights. ``reload`` (default): while it runs.
            ``restart``: the run ends it and starts it again, which needs ``server_python``.
        engine_dtype: number format of the ``transformers`` engine, and of a server that the run
            starts; default ``float32``.
        ahead: rounds of answers that may be written before the step that learns from them, 0 to
            ``objective.max_age``. 0 (default): synchronous, each step waits for its answers. 1 or
            more: asynchronous, the engine writes while the model learns; answers are then ``ahead``
            updates old.
        rounds: most rounds of prompts for one step, default 4. A further round is written while
            groups with differing rewards are missing.
        freeze_router: routers keep their weights, default true: the experts of a token then change
            less between engine and training. The report does not say; NeMo-RL's default.
        mtp_detach: the loss of the MTP head moves its own weights only, default true; false: the
            whole model's. ``loss.mtp_factor`` is its weight, and 0 leaves the head as it is.
        chat_template: Jinja file, or ``mellum`` for ours; None (default): the tokenizer's own, else
            ours.
        eval_answers: answers to each task of the validation, every ``logging.eval_interval`` steps
            and after the last; 0 (default): no validation.
        workers: answers of a rank that are judged at a time; None (default): one per core.

    Raises:
        InputError: a value outside its range, an age beyond the limit, or an engine without its
            address.
    """

    objective: Objective = field(default_factory=Objective)
    engine: Literal["transformers", "vllm"] = "transformers"
    url: str | None = None
    server_python: str | None = None
    hand_over: Literal["reload", "restart"] = "reload"
    engine_dtype: Literal["float32", "bfloat16"] = "float32"
    ahead: int = 0
    rounds: int = 4
    freeze_router: bool = True
    mtp_detach: bool = True
    chat_template: str | None = None
    eval_answers: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        check_fields("rl", self)
        require(
            isinstance(self.objective, Objective),
            f"rl.objective: {shown(self.objective)}",
            rule="must be an Objective",
            fix="give Objective(group_size=16)",
        )
        require(
            0 <= self.ahead <= self.objective.max_age,
            f"rl.ahead={self.ahead}",
            rule="answers written so many rounds ahead would be older than "
            f"rl.objective.max_age ({self.objective.max_age}) allows",
            fix=f"use 0 to {self.objective.max_age}, or raise rl.objective.max_age",
        )
        require_positive("rl.rounds", self.rounds, fix="use 4", most=1000)
        require_path("rl.chat_template", self.chat_template)
        require_not_negative("rl.eval_answers", self.eval_answers, fix="use 0 for none", most=65536)
        if self.workers is not None:
            require_positive("rl.workers", self.workers, fix="use null", most=4096)
        require_path("rl.server_python", self.server_python)
        self._check_server()

    def _check_server(self) -> None:
        for key, value, default in (
            ("url", self.url, None),
            ("server_python", self.server_python, None),
            ("hand_over", self.hand_over, "reload"),
        ):
            require(
                self.engine == "vllm" or value == default,
                f"rl.{key}={value} with rl.engine=transformers",
                rule="that engine runs inside each rank",
                fix=f"set rl.engine=vllm, or rl.{key}={default or 'null'}",
            )
        if self.engine == "transformers":
            return
        if self.server_python is not None:
            require(
                self.url is None,
                f"rl.url={self.url} with rl.server_python={self.server_python}",
                rule="the run starts its own server at a free port, or asks one that runs already",
                fix="leave out one of them",
            )
            return
        require(
            self.hand_over == "reload",
            "rl.hand_over=restart without rl.server_python",
            rule="a run can only restart a server that it has started",
            fix="name vLLM's Python in rl.server_python (docs/rlvr.md)",
        )
        try:
            parts = urlsplit(self.url or "")
            good = (
                parts.scheme in ("http", "https")
                and bool(parts.hostname)
                and "@" not in str(self.url)
            )
            good = good and (parts.port is None or parts.port > 0) and not parts.path.strip("/")
        except ValueError:
            good = False
        require(
            good,
            "rl.engine=vllm without rl.url or rl.server_python"
            if self.url is None
            else f"rl.url={self.url}",
            rule="the server's address is http://HOST:PORT",
            fix="use http://127.0.0.1:8000, or rl.server_python=.venv-serve/bin/python "
            "(docs/rlvr.md)",
        )
