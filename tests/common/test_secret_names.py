"""Names and addresses that hold secrets, and common names that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mellum2_megatron.common import secret_names
from mellum2_megatron.common.provenance import record
from mellum2_megatron.common.secret_names import is_secret_name, mask_secrets

SECRET = """
    WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN GITHUB_PAT DB_PW DB_PWD
    dbPassword db_password SSH_PASSPHRASE HTTP_AUTH SESSION_COOKIE GOOGLE_CREDENTIALS BEARER
    APIKEY OPENAIAPIKEY MYSQL_PASSWD AUTHTOKEN authToken api_key JWT CREDS
""".split()
FINE = """
    PATH PATTERN AUTHOR GIT_AUTHOR_NAME PYTHONPATH LD_LIBRARY_PATH TOKENIZERS_PARALLELISM MONKEY
    KEYBOARD PWD OLDPWD SSH_AUTH_SOCK MAX_NEW_TOKENS PASSES BYPASS PATCH COMPAT AUTHORITY XAUTHORITY
    NCCL_DEBUG OMP_NUM_THREADS CUDA_VISIBLE_DEVICES HOME PYTHONHASHSEED PAGER
""".split()


# Written out again, so that a word that is lost in the module is missed here.
WORDS = """
    TOKEN KEY KEYS SECRET SECRETS PASSWORD PASSWORDS PASSWD PASSPHRASE PASS PW PWD PAT AUTH
    COOKIE COOKIES CREDENTIAL CREDENTIALS CREDS BEARER JWT
""".split()
ENDINGS = """
    XTOKEN XSECRET XPASSWORD XPASSWD XPASSPHRASE XCOOKIE XCREDENTIAL XCREDENTIALS XAPIKEY
    XACCESSKEY XSECRETKEY XPRIVATEKEY XBEARER
""".split()


def test_every_word_has_its_case() -> None:
    assert set(WORDS) == secret_names._WORDS
    assert {name.removeprefix("X") for name in ENDINGS} == set(secret_names._ENDINGS)


@pytest.mark.parametrize("name", [*SECRET, *WORDS, *ENDINGS])
def test_secrets_are_known_by_name(name: str) -> None:
    if name not in ("PWD",):  # alone it is the working directory
        assert is_secret_name(name)
    assert is_secret_name(f"MY_{name}")
    assert is_secret_name(f"my_{name.lower()}")
    assert mask_secrets(f"x MY_{name.upper()}=hunter2 y").endswith("=*** y")


@pytest.mark.parametrize("name", FINE)
def test_common_names_are_no_secrets(name: str) -> None:
    assert not is_secret_name(name)
    assert mask_secrets(f"x {name}=value y") == f"x {name}=value y"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:pw@proxy:80/x", "http://me:***@proxy:80/x"),
        ("http://:pw@proxy", "http://:***@proxy"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("git@host:x/y", "git@host:x/y"),
        ("HF_TOKEN=$TOKEN", "HF_TOKEN=$TOKEN"),
        ("HF_TOKEN='a b' x", "HF_TOKEN=*** x"),
        ("an override is KEY=VALUE. Fix: x", "an override is KEY=VALUE. Fix: x"),
        ("API_KEY=VALUEabc x", "API_KEY=*** x"),
        ("bos_token_id=-1: no", "bos_token_id=-1: no"),
        ("architecture.bos_token_id=3", "architecture.bos_token_id=3"),
        ("data.sequence_length=3", "data.sequence_length=3"),
    ],
)
def test_addresses_and_assignments(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


def test_provenance_holds_no_secret(tmp_path: Path) -> None:
    more = {
        "overrides": ["data.path=s3://me:hunter2@host/x"],
        "variables": {"HF_TOKEN": "hunter2", "PATH": "/bin"},
    }
    line = record(tmp_path, event="launch", more=more)
    text = (tmp_path / "provenance.jsonl").read_text()
    assert "hunter2" not in text
    assert json.loads(text) == line
    assert line["variables"] == {"HF_TOKEN": "***", "PATH": "/bin"}
    assert line["overrides"] == ["data.path=s3://me:***@host/x"]
