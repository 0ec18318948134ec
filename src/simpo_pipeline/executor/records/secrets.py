"""Redaction of likely secrets before they reach a record, recognized by their name or by their own format.

Redaction is best effort: it recognizes only common names and formats. Secrets belong in the environment, which is never
recorded, and not in flags and configs.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

REDACTED = "***"
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "auth", "bearer"}
_SECRET_PAIRS = {"token": {"hf", "api", "access", "auth", "github", "gh", "wandb", "id", "refresh"}}
_SECRET_PAIRS["key"] = {"api", "access", "secret", "private", "wandb", "ssh", "encryption", "account"}
_SHAPE = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-|AIza|ya29\.)[A-Za-z0-9_\-]{8,}")
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_URL_PARAMETER = re.compile(r"([?&](?:[A-Za-z-]*signature|sig|[a-z_]*token|[a-z_]*key)=)[^&\s]+", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Return whether the name is that of a secret: `hf_token`, `wandb.api_key`, `--password`; but not `eos_token`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if _SECRET_WORDS & set(words) or words == ["token"]:
        return True
    pairs = itertools.pairwise(words)
    return "apikey" in words or any(first in _SECRET_PAIRS.get(second, ()) for first, second in pairs)


def redact_text(text: str) -> str:
    """Redact passwords and signatures in URLs, and everything that has the format of a token."""
    text = _URL_PARAMETER.sub(rf"\g<1>{REDACTED}", _URL_PASSWORD.sub(REDACTED, text))
    return _SHAPE.sub(REDACTED, text)


def redact_command_line(words: Sequence[str]) -> list[str]:
    """Redact the values of secret flags (--hf_token X, --hf_token=X) and variables (HF_TOKEN=X) in a command line."""
    shown: list[str] = []
    follows_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("--")
        if follows_secret and not is_flag:
            shown.append(REDACTED)
            continue
        secret = is_secret_name(name) and "/" not in name
        follows_secret = is_flag and not equals and secret
        shown.append(f"{name}={REDACTED}" if equals and secret else redact_text(word))
    return shown


def redact_json(value: Any) -> Any:
    """Redact strings in a JSON value that have a secret name or the format of a secret."""
    match value:
        case str():
            return redact_text(value)
        case dict():
            entries = cast(Mapping[str, Any], value).items()
            return {name: _redact_entry(name, inner) for name, inner in entries}
        case list():
            return [redact_json(inner) for inner in cast(list[Any], value)]
        case _:
            return value


def _redact_entry(name: str, value: Any) -> Any:
    return REDACTED if isinstance(value, str) and value and is_secret_name(name) else redact_json(value)
