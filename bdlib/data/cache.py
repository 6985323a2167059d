"""A real set is converted once into one checksummed safetensors file, which loads in under a second.

The file carries what is known about its source (which files, which checks they failed), so that a copy that was
loaded with `verify=False` stays marked as such.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdlib import files

FORMAT = 2  # raise it when the layout of the file changes: older files are then converted again
_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")

DamagedCache = files.DamagedFile


@dataclass(frozen=True)
class Facts:
    """What is stored beside the pixels.

    Args:
        source: stamp of the files it was made from; another stamp means another source.
        notes: what records must repeat, see `ImageSet.notes`.
        unverified: one line per check that the source failed; empty when all were passed.
    """

    source: str
    notes: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """A set as tensors: images ``(N, C, H, W)`` uint8, labels ``(N,)`` int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    facts: Facts


def cache_path(name: str) -> Path:
    """The cache file of one set, in the store's folder; it need not exist."""
    return files.store_folder() / "data" / f"{name}.safetensors"


def _parse(fields: dict) -> Facts:
    if fields.get("format") != FORMAT:
        raise DamagedCache("written by another version of bdlib")
    return Facts(fields["source"], tuple(fields["notes"]), tuple(fields["unverified"]))


def read(path: Path) -> Converted | None:
    """Read a cache file and check its SHA-256; None when there is none.

    Raises:
        DamagedCache: the file is there and is not what was written.
    """
    found = files.read(path)
    if found is None:
        return None
    tensors, fields = found
    if set(tensors) != set(_TENSORS):
        raise DamagedCache(f"the cache file {path} holds {', '.join(sorted(tensors))} instead of images and labels")
    return Converted(facts=_parse(fields), **tensors)


def summary(path: Path) -> tuple[Facts, dict[str, tuple[int, ...]]] | None:
    """Facts and tensor shapes from the header alone, unchecked; None when there is no readable file."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in _TENSORS}
            return _parse(json.loads(file.metadata()["facts"])), shapes
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(path: Path, converted: Converted) -> None:
    """Write a cache file whole or not at all. Raises OSError as `bdlib.files.write_bytes`."""
    tensors = {name: getattr(converted, name) for name in _TENSORS}
    files.write(path, tensors, {"format": FORMAT, **asdict(converted.facts)})


def to_tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """NumPy images (N, C, H, W) uint8 and labels as the two tensors of a set, in memory of their own."""
    return torch.tensor(images, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64)
