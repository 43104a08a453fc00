"""Environment of NeMo-RL whose rewards are those of `mellum2 rl serve`.

NeMo-RL finds the class by this module's name. It and Ray are imported only then: this project does
not depend on them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.rlvr.reward_client import RewardClient

NAME = "mellum2"
"""Name of the environment, and of its tasks, in NeMo-RL's configuration."""
CLASS = f"{__name__}.RewardEnvironment"
"""Name by which NeMo-RL finds the class."""

_POLL_S = 2.0


def __getattr__(name: str) -> Any:
    if name == "RewardEnvironment":
        return reward_environment()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Scorer:
    """Rewards of answers, less the penalties of length that NeMo-RL cannot take off.

    Args:
        settings: section ``env.mellum2`` of the configuration (`config.environment_settings`).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._client: RewardClient | None = None
        self._tokenizer: Any = None

    def score(self, answers: Sequence[str], tasks: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the reward of each answer.

        Args:
            answers: texts of the answers.
            tasks: ``verifier``, ``arguments``, ``tools`` and ``thinking`` of each one's task.

        Raises:
            WorkError: see `RewardClient.score`; or the service has not written its address.
        """
        if self._client is None:
            self._client = self._connect()
        items = [{**task, "answer": text} for task, text in zip(tasks, answers, strict=True)]
        rewards = self._client.score(items)
        penalties = self._settings["penalties"]
        if penalties["overlong_penalty"] or penalties["concision_penalty"]:
            rewards = self._shaped(rewards, answers, tasks)
        return rewards

    def _connect(self) -> RewardClient:
        """Return the client; the job of the service may start later than this one."""
        settings = self._settings
        url_file, token_file = Path(settings["url_file"]), settings["token_file"]
        end = time.monotonic() + settings["patience_s"]
        while not url_file.is_file():
            if time.monotonic() > end:
                raise WorkError(
                    f"the rewards' service has not written its address to {url_file} for "
                    f"{settings['patience_s']:g} s",
                    fix="look at the log of its job (rewards.sbatch)",
                )
            time.sleep(_POLL_S)
        token = None if token_file is None else Path(token_file).read_text("utf-8").strip()
        return RewardClient(
            url_file.read_text("utf-8").strip(),
            token=token,
            timeout_s=settings["timeout_s"],
            patience_s=settings["patience_s"],
        )

    def _shaped(
        self,
        rewards: Sequence[float],
        answers: Sequence[str],
        tasks: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        import torch

        from mellum2_megatron.config import Objective
        from mellum2_megatron.rlvr.objective import shaped_rewards

        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(self._settings["tokenizer_file"])
        # NeMo-RL hands over texts without their ids, decoded without special tokens.
        encoded = self._tokenizer.encode_batch(list(answers), add_special_tokens=False)
        shaped = shaped_rewards(
            torch.tensor(rewards),
            torch.tensor([len(one.ids) for one in encoded]),
            torch.tensor([bool(task["thinking"]) for task in tasks]),
            Objective(**self._settings["penalties"]),
        )
        return [float(reward) for reward in shaped]


@functools.cache
def reward_environment() -> Any:
    """Return the class, as a remote one of Ray."""
    import ray
    import torch
    from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

    class RewardEnvironment(EnvironmentInterface):  # type: ignore[misc,valid-type]  # not installed
        """Scores each answer once: an episode is one turn."""

        def __init__(self, cfg: Mapping[str, Any]) -> None:
            self._scorer = Scorer(cfg)

        def step(self, message_log_batch: list[Any], metadata: list[Any]) -> Any:
            """Return the rewards of the last turn of each conversation."""
            answers = [str(log[-1]["content"]) for log in message_log_batch]
            rewards = self._scorer.score(answers, metadata)
            number = len(rewards)
            return EnvironmentReturn(
                observations=[{"role": "environment", "content": ""}] * number,
                metadata=metadata,
                next_stop_strings=[None] * number,
                rewards=torch.tensor(rewards, dtype=torch.float32),
                terminateds=torch.ones(number, dtype=torch.bool),
                answers=None,
            )

        def shutdown(self) -> None:
            """Nothing to end."""

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            """Return the batch as it is; NeMo-RL itself logs the rewards."""
            return batch, {}

    return ray.remote(RewardEnvironment)
