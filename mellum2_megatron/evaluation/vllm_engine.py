"""vLLM's server as an engine whose requests are timed, over HTTP as a user meets it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mellum2_megatron.architecture import Mellum2Architecture, to_hf_config
from mellum2_megatron.common.errors import WorkError
from mellum2_megatron.common.files import write_json
from mellum2_megatron.evaluation.inference import Answer
from mellum2_megatron.serving.client import Sampling
from mellum2_megatron.serving.command import EngineVersions
from mellum2_megatron.serving.server import VllmServer

_ROOM = 64
"""Tokens of context beyond a request and its answer."""


class VllmEngine:
    """`inference.Engine` by a running server.

    Args:
        server: the server, which nobody else asks.
    """

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Answer requests that arrive at once; see `Engine`.

        vLLM counts drafts of all requests together: the first answer has them.

        Raises:
            WorkError: the server failed, or an answer has another length.
        """
        client = self._server.client
        before = client.draft_counts()
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_end=True)
        completions = client.complete(prompts, sampling, timed=True)
        after = client.draft_counts()
        answers = []
        for number, one in enumerate(completions):
            if len(one.tokens) != new_tokens or one.first_token is None:
                raise WorkError(
                    f"vLLM gave {len(one.tokens)} of {new_tokens} tokens",
                    fix="see its log, and lower --output",
                )
            drafted = accepted = None
            if before is not None and after is not None:
                drafted = 0 if number else after.drafted - before.drafted
                accepted = 0 if number else after.accepted - before.accepted
            answers.append(
                Answer(
                    first_token=one.first_token,
                    seconds=one.seconds,
                    tokens=new_tokens,
                    output=one.tokens,
                    drafted=drafted,
                    accepted=accepted,
                )
            )
        return answers

    def peak_memory(self) -> int | None:
        """Return the largest resident memory of the server's processes, in bytes."""
        return self._server.peak_memory()


@contextmanager
def vllm_engines(
    python: Path,
    versions: EngineVersions,
    folder: Path,
    architecture: Mellum2Architecture,
    *,
    length: int,
    use_mtp: bool,
    dense: Mellum2Architecture | None,
    work: Path,
) -> Iterator[dict[str, VllmEngine]]:
    """Start a server for each arm of a comparison: the model, with its draft, and a dense one.

    Args:
        python: interpreter of vLLM's environment.
        versions: its versions.
        folder: Hugging Face folder.
        architecture: the folder's.
        length: tokens of a request and its answer.
        use_mtp: add the arm with the draft.
        dense: shape of a dense model to add, its weights random; None: none.
        work: folder for logs and for the dense model's config.

    Raises:
        WorkError: a server does not start.
    """
    # Rounds must not profit from earlier ones.
    common = ["--no-enable-prefix-caching"]
    length = min(length + _ROOM, architecture.max_position_embeddings)
    with ExitStack() as stack:

        def start(name: str, shape: Mellum2Architecture, path: Path, *more: str) -> VllmEngine:
            server = VllmServer(
                python,
                path,
                shape,
                log=work / f"vllm_{name}.log",
                use_mtp=name == "mtp",
                max_length=length,
                dtype="float32" if versions.cpu else "auto",
                eager_on_cpu=True,
                more=(*common, *more),
            )
            return VllmEngine(stack.enter_context(server))

        engines = {"plain": start("plain", architecture, folder)}
        if use_mtp:
            engines["mtp"] = start("mtp", architecture, folder)
        if dense is not None:
            _write_config(dense, folder, work / "dense")
            engines["dense"] = start("dense", dense, work / "dense", "--load-format", "dummy")
        yield engines


def _write_config(shape: Mellum2Architecture, folder: Path, target: Path) -> None:
    """Write a folder without weights, which vLLM's dummy format makes up."""
    target.mkdir()
    write_json(target / "config.json", to_hf_config(shape))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
