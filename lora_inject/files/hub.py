"""Adapters on the Hugging Face hub, by ``huggingface_hub`` where it is installed."""

from pathlib import Path
from typing import Any

from lora_inject.errors import ArgumentError, FormatError, LoRAInjectError
from lora_inject.files.formats import diffusers
from lora_inject.files.formats.card import CARD, HUB_NAME
from lora_inject.files.formats.peft_config import CONFIG, PICKLED, TENSORS

_FILES = [CONFIG, TENSORS, PICKLED, diffusers.TENSORS, CARD]  # and no weights of a whole model
_DIRECTORIES = ("peft", "diffusers")


def found(path: Path) -> Path:
    """The path itself; where there is nothing and it is a name on the hub, what was downloaded.

    Raises:
        FormatError: there is no such path, and the hub does not give it.
    """
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.exists():
        return path
    try:
        api = _api()
        return Path(api.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of many types, by what is wrong with name, login or network
        raise FormatError(
            f"there is no file or directory {name}, and the hub does not give it: {_first(error)}"
        ) from error


def require_uploadable(name: str, format: str) -> None:
    """Refuse what cannot be uploaded, before anything is written.

    Raises:
        ArgumentError: it is no name, the format is a single file, or the library is missing.
    """
    if not isinstance(name, str) or not HUB_NAME.fullmatch(name):
        raise ArgumentError(f'push_to_hub must be a name such as "user/name", not {name!r}.')
    if format not in _DIRECTORIES:
        raise ArgumentError(f"push_to_hub is for the formats {_DIRECTORIES}, not {format!r}.")
    _api()


def upload(folder: Path, name: str) -> None:
    """Upload the files of an adapter, to a repository that is made where there is none.

    Raises:
        LoRAInjectError: that failed.
    """
    try:
        api = _api()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=_FILES)
    except Exception as error:
        raise LoRAInjectError(
            f"{folder} is saved, and was not uploaded to {name}: {_first(error)}"
        ) from error


def _api() -> Any:
    """The hub's client.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ArgumentError(
            "huggingface_hub is not installed.", remedy="Install it: pip install huggingface_hub."
        ) from error
    return HfApi(library_name="lora_inject")


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
