"""`mellum2 serve`: a model behind vLLM's own server, for a person who wants to try it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mellum2_megatron.common.console import print_line
from mellum2_megatron.common.errors import InputError


def serve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder")],
    use_mtp: Annotated[
        bool, typer.Option("--use-mtp", help="draft with the MTP head, one token a step")
    ] = False,
    python: Annotated[
        Path, typer.Option("--python", help="Python of an environment with vLLM")
    ] = Path(".venv-serve/bin/python"),
    name: Annotated[str, typer.Option("--name", help="name of the model in requests")] = "mellum2",
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="port")] = 8000,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="tokens of a request and its answer; default: all"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (the folder's), bfloat16 or float32")
    ] = "auto",
    reloadable: Annotated[
        bool,
        typer.Option("--reloadable", help="take new weights while it runs, as rl.url needs"),
    ] = False,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM OPTIONS]", help="further options of vLLM's own"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the command, and start nothing")
    ] = False,
) -> None:
    """Serve a model with vLLM's server, which speaks OpenAI's protocol.

    A line of curl to try it is printed first. vLLM lives in an environment of its own. It is told
    not to report its use, and to ask no hub.
    """
    from conversion.huggingface.folder import HfFolder
    from mellum2_megatron.serving.command import (
        ENVIRONMENT,
        check_versions,
        curl_line,
        read_versions,
        reload_switches,
        serve_command,
    )

    if dtype not in ("auto", "bfloat16", "float32"):
        raise InputError(
            f"--dtype {dtype}", rule="no such dtype", fix="use auto, bfloat16 or float32"
        )
    with HfFolder.open(folder) as opened:
        architecture = opened.architecture
    versions = read_versions(python)
    check_versions(versions, architecture, use_mtp=use_mtp)
    words, switches = reload_switches(versions) if reloadable else ([], {})
    command = [
        *serve_command(
            python,
            folder,
            architecture,
            name=name,
            host=host,
            port=port,
            use_mtp=use_mtp,
            max_length=max_length,
            dtype=dtype,
        ),
        *words,
        *(more or []),
    ]
    settings = [f"{name}={value}" for name, value in switches.items()]
    print_line(shlex.join([*settings, *command]))
    print_line("When it is up: " + curl_line(folder, name=name, host=host, port=port))
    if not dry_run:
        os.execve(command[0], command, {**os.environ, **ENVIRONMENT, **switches})
