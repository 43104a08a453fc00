"""Settings of training data that are streamed through Redis (``data.feed=redis``)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from mellum2_megatron.common.field_checks import (
    check_fields,
    require,
    require_name,
    require_path,
    require_positive,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Server and limits of ``data.feed=redis``; without meaning for ``files``.

    Attributes:
        url: ``redis://HOST:PORT`` or ``rediss://HOST:PORT`` (TLS) of a server that is there
            already, without a password. None (default): the launcher starts a server for the run,
            on loopback if the run has one node, else on the address of its first node.
        user: name of the ACL user that reads, default ``trainer``.
        password_file: file with that user's password, readable by its owner only; None (default):
            no password. The launcher's own server has passwords without it.
        streamer_user: name of the ACL user that writes, default ``streamer``.
        streamer_password_file: file with its password; None (default): writes as ``user``.
        ca_file: certificate of the authority that signed the server's, for TLS; default none.
        certificate: file of a certificate, with which the launcher's own server uses TLS; default
            none. It must name the host in the URL: 127.0.0.1 on one node.
        key: file of its private key, default none.
        window: samples kept ahead of the slowest reader; None (default): two of the run's largest
            batches.
        timeout_s: seconds that a reader waits for a sample before the run fails, default 300.

    Raises:
        InputError: another URL, a password in it, or a number out of range.
    """

    url: str | None = None
    user: str = "trainer"
    password_file: str | None = None
    streamer_user: str = "streamer"
    streamer_password_file: str | None = None
    ca_file: str | None = None
    certificate: str | None = None
    key: str | None = None
    window: int | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        check_fields("data.stream", self)
        if self.url is not None:
            self._check_url(self.url)
        for name in ("user", "streamer_user"):
            require_name(f"data.stream.{name}", getattr(self, name))
        files = ("password_file", "streamer_password_file", "ca_file", "certificate", "key")
        for name in files:
            require_path(f"data.stream.{name}", getattr(self, name))
        require(
            (self.certificate is None) == (self.key is None),
            "data.stream.certificate" if self.key is None else "data.stream.key",
            rule="a server with TLS needs both a certificate and its key",
            fix="set data.stream.certificate and data.stream.key, or neither",
        )
        require(
            self.certificate is None or self.url is None,
            f"data.stream.url={self.url} with data.stream.certificate",
            rule="the certificate is for the launcher's own server, and this one has its own",
            fix="leave out data.stream.certificate and data.stream.key",
        )
        require(
            self.certificate is None or self.ca_file is not None,
            f"data.stream.certificate={self.certificate}",
            rule="readers check it against the authority that signed it, which is not named",
            fix="set data.stream.ca_file (a self-signed certificate is its own authority)",
        )
        if self.window is not None:
            require_positive("data.stream.window", self.window)
        require_positive("data.stream.timeout_s", self.timeout_s, fix="use 300")

    @staticmethod
    def _check_url(url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        # First, so that no message shows the password.
        require(
            "@" not in url,
            "data.stream.url",
            rule="a password in the URL would be written to run files and logs",
            fix="leave it out, and name its file with data.stream.password_file",
        )
        require(
            parts.scheme in ("redis", "rediss")
            and bool(parts.hostname)
            and port is not None
            and not (parts.path.strip("/") or parts.query or parts.fragment),
            f"data.stream.url={url}",
            rule="it must be redis://HOST:PORT or rediss://HOST:PORT",
            fix="use redis://127.0.0.1:6379",
        )
