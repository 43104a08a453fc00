"""Certificates for tests, made with the program openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no program openssl")

_CONFIG = """
[ca]
default_ca = it
[it]
new_certs_dir = .
database = index.txt
serial = serial.txt
default_md = sha256
policy = any
[any]
commonName = supplied
[own]
subjectAltName = IP:127.0.0.1
[node]
subjectAltName = IP:127.0.0.2
"""


def certificate(folder: Path, *, expired: bool = False, names: str = "own") -> tuple[str, str]:
    """Make a self-signed certificate, its own authority, and a key.

    Args:
        folder: folder to make.
        expired: true: it ended in 2021; false (default): it lasts to 2049.
        names: ``own`` (default) for 127.0.0.1, ``node`` for 127.0.0.2.

    Returns:
        Files of certificate and key.
    """
    folder.mkdir(parents=True)
    (folder / "ca.cnf").write_text(_CONFIG)
    (folder / "index.txt").touch()
    (folder / "serial.txt").write_text("01\n")
    end = "210101000000Z" if expired else "491231000000Z"
    key = "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem"
    # `openssl req -x509` makes no certificate that has ended.
    sign = "ca -batch -notext -config ca.cnf -selfsign -keyfile key.pem -in request.pem"
    for words in (
        f"{key} -subj /CN=test -out request.pem",
        f"{sign} -out certificate.pem -extensions {names} -startdate 200101000000Z -enddate {end}",
    ):
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)
    return str(folder / "certificate.pem"), str(folder / "key.pem")
