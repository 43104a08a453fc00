"""Configuration of a Redis server for one run: bounded memory, two users, nothing on disk.

Users and their rights: ``streamer`` writes samples; ``trainer`` reads them and writes its place.
Both are bound to the run's keys. The default user is off, so that a connection without a password
can do nothing.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from mellum2_megatron.common.errors import InputError, first_line
from mellum2_megatron.common.field_checks import require
from mellum2_megatron.common.files import read_text, write_text
from mellum2_megatron.data.feed.redis_client import read_password
from mellum2_megatron.data.feed.redis_wire import Keys

# redis-py names itself with CLIENT SETINFO at every connection; Redis 7.0 knows no rule for the
# subcommand alone.
_TRAINER = "+mget +hset +hgetall +sadd +ping +hello +client"
_STREAMER = "+set +unlink +del +hset +hgetall +hvals +spop +get +pexpire +ping +hello +client +info"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFiles:
    """What a server of one run needs, in its own folder of mode 0700.

    Attributes:
        config: configuration file, the argument of ``redis-server``.
        trainer_password, streamer_password: files with the passwords.
    """

    config: Path
    trainer_password: Path
    streamer_password: Path


def write_server_files(
    folder: Path,
    keys: Keys,
    *,
    address: str,
    port: int,
    memory: int,
    certificate: tuple[str, str] | None = None,
) -> ServerFiles:
    """Write configuration, users and passwords of a run's server.

    Args:
        folder: folder to make; readable by its owner only.
        keys: names of the run's keys.
        address: address to listen on: ``127.0.0.1``, or the node's on the job's network.
        port: port.
        memory: bytes that the server may use at most.
        certificate: files of certificate and key; connections are TLS only. None (default): plain.

    Raises:
        InputError: a path that a configuration file cannot hold, a password's file that is
            damaged, or a certificate and key that do not fit.
    """
    if certificate:
        check_certificate(*certificate)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    passwords: dict[str, str] = {}
    for name in ("trainer", "streamer"):
        file = folder / f"{name}.password"
        # Those of an earlier start stay: another node may have them in its file cache.
        if not file.exists():
            _write_private(file, secrets.token_urlsafe(32) + "\n")
        passwords[name] = read_password(file)
    rights = {"trainer": _TRAINER, "streamer": _STREAMER}
    users = ["user default off"]
    for name, password in passwords.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        users.append(f"user {name} on #{digest} resetkeys ~{keys.run_prefix}* -@all {rights[name]}")
    _write_private(folder / "users.acl", "\n".join(users) + "\n")
    lines = [
        f"bind {address}",
        f"port {0 if certificate else port}",
        f"aclfile {_quoted(folder / 'users.acl')}",
        f"dir {_quoted(folder)}",
        f"maxmemory {memory}",
        "maxmemory-policy noeviction",
        # Samples can be made again, so nothing is written to disk.
        'save ""',
        "appendonly no",
        "daemonize no",
    ]
    if certificate:
        lines += [
            f"tls-port {port}",
            f"tls-cert-file {_quoted(certificate[0])}",
            f"tls-key-file {_quoted(certificate[1])}",
            # Readers prove themselves by password.
            "tls-auth-clients no",
        ]
    write_text(folder / "redis.conf", "\n".join(lines) + "\n")
    return ServerFiles(
        config=folder / "redis.conf",
        trainer_password=folder / "trainer.password",
        streamer_password=folder / "streamer.password",
    )


def check_certificate(certificate: str, key: str) -> None:
    """Refuse files that are not a certificate and its key.

    Raises:
        InputError: one is missing, unreadable or damaged, they do not fit, or the key has a
            password.
    """
    fix = "name a certificate and its key, both PEM, the key without a password"
    for name, file in (("certificate", certificate), ("key", key)):
        read_text(Path(file), f"data.stream.{name}={file}", fix=fix)

    def ask_nobody() -> str:
        raise ValueError("the key has a password")

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=ask_nobody)
    except (ssl.SSLError, ValueError) as error:
        raise InputError(
            f"data.stream.certificate={certificate} with data.stream.key={key}",
            rule=f"a server cannot use them ({first_line(error)})",
            fix=fix,
        ) from None


def _quoted(path: str | Path) -> str:
    """Return a path as a Redis configuration file spells it.

    Raises:
        InputError: it holds a line end or another control character.
    """
    text = str(Path(path).absolute())
    require(
        text.isprintable(),
        repr(text),
        rule="control characters cannot stand in a Redis configuration",
        fix="use a path without them",
    )
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)
    except OSError as error:
        raise InputError(
            str(path), rule=f"it cannot be written ({error.strerror})", fix="name another folder"
        ) from None
