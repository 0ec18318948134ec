"""The files of a tokenizer: where they are, whether they agree, and the tokenizer that they describe.

tokenizer.json determines the token ids. The other files name the roles of its tokens and the chat template. No code of
a folder is run, and a folder whose files contradict each other is refused.
"""

import json
import os
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from simpo_pipeline.data.tokenizer import Tokenizer, backend_errors, encode_with
from simpo_pipeline.errors import DataError, first_line
from simpo_pipeline.storage.files import list_files, read_bytes
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme

_TOKENIZER, _CONFIG, _SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_MODEL_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
# A model folder also contains gigabytes of weights, which must not be downloaded for its tokenizer.
_FILES = (_TOKENIZER, _CONFIG, _SPECIAL_TOKENS, _TEMPLATE, _MODEL_CONFIG, _GENERATION_CONFIG)
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# Half of a character. JSON allows it, and no token has it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_HOW_TO_CONVERT = (
    "convert it once, for example with AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers, "
    "and compare the ids of some texts"
)


@contextmanager
def tokenizer_folder(path: str) -> Generator[Path]:
    """Yield a local folder with the tokenizer's files of a folder at any storage path, or of a model on the hub.

    Args:
        path: A local folder, an fsspec folder (`gs://...`), or a hub id (`owner/name`, `owner/name@revision`).

    Raises:
        DataError: There is no such folder, or the hub does not have it.
        StorageError: The folder cannot be read.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as folder:
            for entry in list_files(path):
                if entry.relative_path in _FILES:
                    Path(folder, entry.relative_path).write_bytes(read_bytes(join(path, entry.relative_path)))
            yield Path(folder)
        return
    local_path = strip_file_scheme(path)
    if os.path.isdir(local_path):
        yield Path(local_path)
        return
    if local_path != path or path.startswith(("/", ".")):
        raise DataError(f"{path}: there is no such folder; expected the folder of a tokenizer or a model id on the hub")
    yield _download(path)


def read_tokenizer(folder: Path, name: str) -> Tokenizer:
    """Return the tokenizer of a local folder; `name` is the path in messages.

    Raises:
        DataError: A file is missing or malformed, two files contradict each other, or the tokenizer needs code.
    """
    configs = {file: _read_object(folder / file, name) for file in (_CONFIG, _MODEL_CONFIG, _GENERATION_CONFIG)}
    config = configs[_CONFIG]
    _refuse_code(configs, name)
    backend = _read_backend(folder, name)
    special_tokens = _read_roles(_read_object(folder / _SPECIAL_TOKENS, name), config, name)
    adds_bos = _flag(config, "add_bos_token", name)
    if adds_bos and "bos_token" not in special_tokens:
        raise DataError(f"{name}: {_CONFIG} has add_bos_token, but names no bos_token; add it, or remove the flag")
    if _flag(config, "split_special_tokens", name):
        raise DataError(
            f"{name}: {_CONFIG} has split_special_tokens, which contradicts {_TOKENIZER}: there, a special token is "
            f"one token; remove the flag"
        )
    _check_tokens(backend, special_tokens, config, name)
    return Tokenizer(
        name=name,
        backend=backend,
        special_tokens=special_tokens,
        chat_template=_read_template(folder, config, name),
        adds_bos=adds_bos,
        model_end_ids=_end_ids(configs, name),
    )


def _download(hub_id: str) -> Path:
    # Imported here because it is slow, and only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{hub_id}: there is no such folder, and no tokenizer could be loaded from the hub ({first_line(error)}); "
            f"check the name, or log in with `hf auth login` if the model is gated"
        ) from error


def _read_text(path: Path, name: str) -> str | None:
    """Return the text of a file, or None if there is no file of that name."""
    if not os.path.lexists(path):
        return None
    # A link without its target must not fall back to another file, and a pipe would never end.
    if not path.is_file():
        raise DataError(f"{name}: {path.name} is not a file, or a link to a file that is missing; fetch it again")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: {path.name} cannot be read as UTF-8 text ({first_line(error)}); fetch it again"
        ) from error


def _read_object(path: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is no such file."""
    text = _read_text(path, name)
    try:
        value = {} if text is None else json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {path.name} is not JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{name}: {path.name} contains {type(value).__name__} in JSON; expected an object")
    return cast(dict[str, Any], value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} occurs twice")
        found[key] = value
    return found


def _read_backend(folder: Path, name: str) -> Backend:
    path = folder / _TOKENIZER
    if not path.is_file():
        others = [file for file in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / file).is_file()]
        found = f"it has {' and '.join(others)}" if others else "it has no other tokenizer file either"
        raise DataError(
            f"{name}: no tokenizer could be loaded, because the folder has no {_TOKENIZER} ({found}); expected a "
            f"folder with {_TOKENIZER} and {_CONFIG}, or the id of a model on the hub; if the tokenizer has another "
            f"format, {_HOW_TO_CONVERT}"
        )
    complaint = f"{name}: {_TOKENIZER} is no tokenizer of the tokenizers library"
    with backend_errors(complaint, f"fetch it again, or {_HOW_TO_CONVERT}"):
        backend = Backend.from_file(str(path))
    if getattr(backend.model, "dropout", None):
        raise DataError(
            f"{name}: the model in {_TOKENIZER} has a dropout of {backend.model.dropout}, so the same text would get "
            f"other ids each time; set dropout to null"
        )
    vocabulary = backend.get_vocab()
    if not vocabulary:
        raise DataError(f"{name}: the vocabulary in {_TOKENIZER} is empty; fetch the file again")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise DataError(f"{name}: {_TOKENIZER} gives several tokens the same id; fetch it again, or correct the ids")
    # A text is never cut here, whatever length the file was saved with.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _refuse_code(configs: Mapping[str, Mapping[str, Any]], name: str) -> None:
    for file, config in configs.items():
        code = config.get("auto_map")
        if code and (file == _CONFIG or (isinstance(code, dict) and "AutoTokenizer" in code)):
            raise DataError(
                f"{name}: {file} has auto_map, so the tokenizer is a program in the folder; such a program is never "
                f"run. If {_TOKENIZER} gives the same ids without it, remove auto_map; otherwise {_HOW_TO_CONVERT}"
            )


def _read_roles(special: Mapping[str, Any], config: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the special tokens by role, from the file that transformers reads them from."""
    old = {} if "added_tokens_decoder" in config else special
    roles: dict[str, str] = {}
    for role in _ROLES:
        file, value = (_SPECIAL_TOKENS, old[role]) if role in old else (_CONFIG, config.get(role))
        if value is not None:
            roles[role] = _token_text(value, f"{name}: {role} of {file}")
    for role in ("bos_token", "eos_token"):
        found = {_token_text(file[role], f"{name}: {role}") for file in (special, config) if file.get(role) is not None}
        if len(found) > 1:
            raise DataError(
                f"{name}: {role} is {' in one and '.join(map(repr, sorted(found)))} in the other of {_CONFIG} and "
                f"{_SPECIAL_TOKENS}; the two files must agree: fetch both from one source"
            )
    # Roles of one model only, which its template may print.
    more = config.get("extra_special_tokens")
    own = {**config, **more} if isinstance(more, dict) else config
    return {
        **{role: text for role, text in own.items() if role.endswith("_token") and isinstance(text, str) and text},
        **roles,
    }


def _token_text(value: Any, where: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text or _SURROGATE.search(text):
        raise DataError(f"{where} is {value!r:.80}; expected the text of a token, or an object with its content")
    return text


def _flag(config: Mapping[str, Any], key: str, name: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{name}: {key} of {_CONFIG} is {value!r:.80}; expected true or false")
    return value


def _check_tokens(backend: Backend, roles: Mapping[str, str], config: Mapping[str, Any], name: str) -> None:
    """Check that tokenizer.json reads the tokens that chats and templates contain as one token, with the same id."""
    named = {roles[role]: role for role in ("bos_token", "eos_token") if role in roles}
    for key in _MORE_TOKENS:
        more = config.get(key) or []
        if not isinstance(more, list | dict):
            raise DataError(f"{name}: {key} of {_CONFIG} is {more!r:.80}; expected a list of tokens")
        for value in more.values() if isinstance(more, dict) else more:
            named.setdefault(_token_text(value, f"{name}: {key} of {_CONFIG}"), key)
    for text, role in named.items():
        index = backend.token_to_id(text)
        if index is None or encode_with(backend, text, name) != [index]:
            found = "does not have it" if index is None else "does not read it as one token"
            raise DataError(
                f"{name}: {role} is {text!r}, but {_TOKENIZER} {found}; the two files must agree: correct the role, or "
                f"add the token to {_TOKENIZER} (save_pretrained of transformers writes both)"
            )
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise DataError(
            f"{name}: added_tokens_decoder of {_CONFIG} is {added!r:.80}; expected an object of tokens by id"
        )
    for index, value in added.items():
        text = _token_text(value, f"{name}: added_tokens_decoder[{index}] of {_CONFIG}")
        if str(backend.token_to_id(text)) != index:
            raise DataError(
                f"{name}: {_CONFIG} gives {text!r} the id {index}, but its id in {_TOKENIZER} is "
                f"{backend.token_to_id(text)}; the two files must agree: fetch both from one source"
            )


def _read_template(folder: Path, config: Mapping[str, Any], name: str) -> str | None:
    """Return the chat template. chat_template.jinja wins, as in transformers. Of several, it is the one named default.

    Raises:
        DataError: There are several, and none is named default.
    """
    template: Any = _read_text(folder / _TEMPLATE, name)
    file = _CONFIG if template is None else _TEMPLATE
    if template is None:
        template = config.get("chat_template")
    if isinstance(template, list):
        template = _named_templates(template, name)
    if isinstance(template, dict):
        named = cast(dict[str, Any], template)
        if "default" not in named:
            raise DataError(
                f"{name}: {_CONFIG} has the chat templates {', '.join(map(str, named)) or 'none'}, and none of them is "
                f"named default; name the one to use default, or write it to {_TEMPLATE}"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise DataError(f"{name}: chat_template of {_CONFIG} is {template!r:.80}; expected the text of a template")
    if template and template.startswith("\ufeff"):
        raise DataError(
            f"{name}: the chat template in {file} begins with a byte order mark, which every prompt would begin with; "
            f"save it as UTF-8 without one"
        )
    return template or None


def _named_templates(entries: list[Any], name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries:
        match entry:
            case {"name": str(key), "template": str(template)} if key not in found:
                found[key] = template
            case _:
                raise DataError(
                    f"{name}: chat_template of {_CONFIG} contains {entry!r:.80}; expected an object with a name of its "
                    f"own and a template, both text"
                )
    return found


def _end_ids(configs: Mapping[str, Mapping[str, Any]], name: str) -> tuple[int, ...]:
    ids: list[int] = []
    for file in (_MODEL_CONFIG, _GENERATION_CONFIG):
        value = configs[file].get("eos_token_id")
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise DataError(f"{name}: eos_token_id of {file} is {value!r:.80}; expected an id, or a list of ids")
            ids.append(index)
    return tuple(dict.fromkeys(ids))
