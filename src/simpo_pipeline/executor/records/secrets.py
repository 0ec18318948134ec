"""What looks like a secret is blotted out before it reaches a record: by the name it goes by, or by its own shape.

A net with meshes: it catches the names and shapes that are usual. Secrets belong into the environment, which is never
recorded, and not into flags and configs.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

BLOT = "***"
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "auth", "bearer"}
_SECRET_PAIRS = {"token": {"hf", "api", "access", "auth", "github", "gh", "wandb", "id", "refresh"}}
_SECRET_PAIRS["key"] = {"api", "access", "secret", "private", "wandb", "ssh", "encryption", "account"}
_SHAPE = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-|AIza|ya29\.)[A-Za-z0-9_\-]{8,}")
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_URL_PARAMETER = re.compile(r"([?&](?:[A-Za-z-]*signature|sig|[a-z_]*token|[a-z_]*key)=)[^&\s]+", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret: `hf_token`, `wandb.api_key`, `--password`; not `eos_token`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if _SECRET_WORDS & set(words) or words == ["token"]:
        return True
    pairs = itertools.pairwise(words)
    return "apikey" in words or any(first in _SECRET_PAIRS.get(second, ()) for first, second in pairs)


def blotted_text(text: str) -> str:
    """The text without passwords and signatures in URLs, and without what has the shape of a token."""
    text = _URL_PARAMETER.sub(rf"\g<1>{BLOT}", _URL_PASSWORD.sub(BLOT, text))
    return _SHAPE.sub(BLOT, text)


def blotted_words(words: Sequence[str]) -> list[str]:
    """A command line without the values of secret flags (--hf_token X, --hf_token=X) and variables (HF_TOKEN=X)."""
    shown: list[str] = []
    follows_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = word.startswith("--")
        if follows_secret and not is_flag:
            shown.append(BLOT)
            continue
        secret = is_secret_name(name) and "/" not in name
        follows_secret = is_flag and not equals and secret
        shown.append(f"{name}={BLOT}" if equals and secret else blotted_text(word))
    return shown


def blotted_values(value: Any) -> Any:
    """A JSON value in which texts under secret names, and texts of a secret's shape, are blotted out."""
    match value:
        case str():
            return blotted_text(value)
        case dict():
            entries = cast(Mapping[str, Any], value).items()
            return {name: _blotted_entry(name, inner) for name, inner in entries}
        case list():
            return [blotted_values(inner) for inner in cast(list[Any], value)]
        case _:
            return value


def _blotted_entry(name: str, value: Any) -> Any:
    return BLOT if isinstance(value, str) and value and is_secret_name(name) else blotted_values(value)
