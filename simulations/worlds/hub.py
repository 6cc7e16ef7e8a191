"""Hugging Face data sets, saved or on the hub; the package `datasets` is imported only here and only on use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from common.errors import DataError

__all__ = ["is_name", "is_saved", "load", "load_saved", "one_split"]

_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?", re.ASCII
)


def is_name(text: str) -> bool:
    """Whether `text` has the form ``owner/name``, ``owner/name:config`` or ``owner/name:config@split``."""
    return _NAME.fullmatch(text) is not None


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`, or holds such folders."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def load(source: str) -> Any:
    """Load one split of a data set of the hub; from the local cache alone where HF_HUB_OFFLINE is set.

    Raises:
        DataError: The package is not installed, or the data set cannot be had.
    """
    parts = _NAME.fullmatch(source)
    if parts is None:
        raise ValueError("not the name of a data set")
    datasets = _datasets(source)
    try:
        found: Any = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"])
    except Exception as error:  # the package raises its own, the hub's, requests', and plain ones
        offline = " (offline, so only what was downloaded before is there)" if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"{source}: no such file or folder here, and not to be had from the Hugging Face hub{offline}: "
            f"{type(error).__name__}"
        ) from None
    return one_split(found, source)


def load_saved(folder: Path) -> Any:
    """Load one split of a saved data set.

    Raises:
        DataError: The package is not installed, or the folder is damaged.
    """
    datasets = _datasets(str(folder))
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise DataError(f"{folder}: cannot be read as a saved data set ({type(error).__name__})") from None
    return one_split(found, str(folder))


def one_split(found: Any, name: str) -> Any:
    """Take "train", or the only split there is: splits by others are not by user, and may repeat each other.

    Raises:
        DataError: There are several and none is called train.
    """
    if not isinstance(found, Mapping):
        return found
    splits = cast("Mapping[str, Any]", found)
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise DataError(f"{name}: name one of the splits, as in owner/name@split or folder/split: {', '.join(splits)}")


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: reading Hugging Face data sets needs the package datasets") from None
    return datasets
