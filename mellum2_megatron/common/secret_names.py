"""Secrets by name and in addresses: what no file, script or message of ours may hold."""

from __future__ import annotations

import re

_WORDS = frozenset(
    "TOKEN KEY KEYS SECRET SECRETS PASSWORD PASSWORDS PASSWD PASSPHRASE PASS PW PWD PAT AUTH "
    "COOKIE COOKIES CREDENTIAL CREDENTIALS CREDS BEARER JWT".split()
)
"""Words of a name that make it a secret: ``DB_PW``, but not ``PATH`` or ``GIT_AUTHOR_NAME``."""
_ENDINGS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "COOKIE", "CREDENTIAL", "CREDENTIALS"),
    *("APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY", "BEARER"),
)
"""Endings of a word that make it a secret: ``WANDBAPIKEY``."""
_COMMON = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK"})
"""Names with such a word that hold no secret."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*):[^\s/@]+@")
_NAME = re.compile(r"(?<![\w.$])([A-Za-z_]\w*)=")
# Not a variable, a command, a mask or the placeholder of our messages, `KEY=VALUE`.
_VALUE = re.compile(r"""(?!["']?\$|\*\*\*|VALUE[.:,]?(?:\s|$))('[^']*'|"[^"]*"|[^\s;&|'"]+)""")


def is_secret_name(name: str) -> bool:
    """Return true if a variable of this name holds a secret.

    >>> is_secret_name("WANDB_API_KEY"), is_secret_name("dbPassword"), is_secret_name("PATH")
    (True, True, False)
    """
    words = [word.upper() for word in _WORD.findall(name)]
    secret = any(word in _WORDS or word.endswith(_ENDINGS) for word in words)
    return secret and name.upper() not in _COMMON


def mask_secrets(text: str) -> str:
    """Return ``text`` with ``***`` for passwords in addresses and for values of secret names.

    A name in small letters counts only if its last word is the secret: ``bos_token_id=0`` stays.

    >>> mask_secrets("clone https://me:abc@host/x with HF_TOKEN=abc")
    'clone https://me:***@host/x with HF_TOKEN=***'
    """

    text, end, parts = _ADDRESS.sub(r"\1:***@", text), 0, []
    for name in _NAME.finditer(text):
        words = _WORD.findall(name[1])
        value = _VALUE.match(text, name.end())
        secret = is_secret_name(name[1] if name[1].isupper() else words[-1] if words else "")
        if secret and value and name.start() >= end:
            parts += [text[end : name.end()], "***"]
            end = value.end()
    return "".join([*parts, text[end:]])
