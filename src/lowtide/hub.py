"""Where a checkpoint is, in a folder or on the Hub, and how the files needed come to a local folder."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.killed_saves import complete_saves

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_LINK = re.compile(r"(?:https://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path with its "~" written out; raises `FileNotFoundError` where this user has no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{os.fspath(path)}: there is no home folder here that '~' could stand for. Write the path out."
        ) from error


def hub_cache(name: str = "") -> Path:
    """Where files of the model called `name` on the Hub are or will be kept.

    That is the Hub's own cache or, where it lacks the model and cannot be written to, a folder for temporary files.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)  # begins with "~" where there is no home folder
    has_model = bool(name) and (cache / f"models--{name.replace('/', '--')}").is_dir()
    if has_model or (cache.is_absolute() and _can_be_made(cache)):
        return cache
    return Path(tempfile.gettempdir()) / f"lowtide-hub-{os.getuid()}"


def _can_be_made(folder: Path) -> bool:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(nearest, os.W_OK)


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a folder's path, or a Hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5".

    `revision` is a branch, tag or commit on the Hub; `local_files_only` never asks the network,
    `force_download` fetches files that the cache has, too.
    """

    name: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    def fetch(self, patterns: Iterable[str]) -> Path:
        """A local folder with the checkpoint's files that match one of the `patterns` (`fnmatch`).

        A local folder is returned as it is, once saves in it that were killed midway are completed. From the Hub only
        the matching files are downloaded to its cache; offline the cache alone is used. Raises `FileNotFoundError` if
        the name is neither a folder nor a Hub id whose files can be downloaded or are in the cache.
        """
        folder = local_path(self.name)
        if folder.is_dir():
            for saved in (folder.resolve(), folder.resolve().parent):  # a component's is saved with its pipeline's
                complete_saves(saved)
            return folder
        if folder.exists():
            raise FileNotFoundError(
                f"{self.name} is a file. Give the folder of a checkpoint, the one that holds its model_index.json or "
                "config.json. A .safetensors file of a whole pipeline is loaded by lowtide.load, or from_single_file."
            )
        if not HUB_ID.fullmatch(self.name):
            raise FileNotFoundError(
                f"No model at {self.name!r}: there is no such folder here, and it is not a Hub id ('owner/name'). "
                "Give a folder that holds a model_index.json or config.json, or a Hub id."
            )
        return self._from_hub(list(patterns))

    def _cache(self) -> Path:
        cache = hub_cache(self.name)
        if cache.parent == Path(tempfile.gettempdir()) and cache.name.startswith("lowtide-hub-"):
            cache.mkdir(mode=0o700, exist_ok=True)
            if cache.stat().st_uid != os.getuid():
                raise PermissionError(f"{cache} belongs to somebody else. Set HF_HOME to a folder of your own.")
            warnings.warn(
                f"There is no home folder that can be written to, so files from the Hub are kept in {cache}. Set "
                "HF_HOME to another folder.",
                stacklevel=2,
            )
        return cache

    def _from_hub(self, patterns: list[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                self.name,
                revision=self.revision,
                cache_dir=self.cache_dir or self._cache(),
                token=self.token,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                allow_patterns=patterns,
            )
        except HFValidationError as error:
            raise FileNotFoundError(
                f"No model at {self.name!r}: there is no such folder here, and it is not a Hub id: {error}"
            ) from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"No model at {self.name!r}: there is no such folder here, the Hub could not be reached, and its cache "
                "on this machine does not have it. Check the connection (and HF_HUB_OFFLINE, local_files_only), or "
                "give the path of a downloaded folder."
            ) from error
        except HfHubHTTPError as error:
            raise FileNotFoundError(
                f"The Hub does not give {self.name!r} (revision {self.revision or 'main'}): {error}. Check the id; for "
                "a private or gated model log in with `hf auth login` or pass token=."
            ) from error
        return Path(folder)


def file_of_link(source: Source) -> Path:
    """The file that a path or a link to the Hub stands for, fetched where it is not in the cache.

    Raises `FileNotFoundError` where there is none.
    """
    path = local_path(source.name)
    link = _LINK.fullmatch(source.name)
    if path.exists() or link is None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{source.name} is no file. Give a .safetensors file of a whole pipeline, or a link to one on the Hub: "
                "https://huggingface.co/OWNER/NAME/blob/main/FILE. A folder or Hub id is loaded with from_pretrained."
            )
        return path
    return replace(source, name=link[1], revision=source.revision or link[2]).fetch([link[3]]) / link[3]


def weight_patterns(base_name: str, variant: str | None) -> list[str]:
    """File patterns of the weights called `base_name`, whole or in shards, of one variant only."""
    if variant is None:
        return [
            f"{base_name}.safetensors",
            f"{base_name}-?????-of-?????.safetensors",
            f"{base_name}.safetensors.index.json",
        ]
    return [
        f"{base_name}.{variant}.safetensors",
        f"{base_name}.{variant}-?????-of-?????.safetensors",
        f"{base_name}-?????-of-?????.{variant}.safetensors",
        f"{base_name}.safetensors.index.{variant}.json",
    ]
