"""The folder of a model that a user names: a folder at any storage path, or a model on the Hugging Face hub."""

import logging
import os

from simpo_pipeline.errors import ModelError, first_line
from simpo_pipeline.storage.paths import is_local, strip_file_scheme

logger = logging.getLogger(__name__)

# Repositories also have weights in other formats, and programs, which are never downloaded.
_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def model_folder(model: str) -> str:
    """Return `model` if it is a path, or the local copy of a hub id (`owner/name`, `owner/name@revision`).

    A relative path is a path if there is such a folder. Models of the hub are kept in the cache of huggingface_hub,
    which its environment variables configure (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).

    Raises:
        ModelError: There is no such folder, and the hub does not have the model.
    """
    path = strip_file_scheme(model)
    if not is_local(model) or path != model or path.startswith(("/", ".", "~")) or os.path.isdir(path):
        return model
    # Imported here because it is slow, and only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    logger.info("loading %s from the Hugging Face hub or its local cache", model)
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model!r} is not an existing folder, and could not be loaded from the hub ({first_line(error)}); check "
            "the name, or log in with `hf auth login` if the model is gated"
        ) from error
