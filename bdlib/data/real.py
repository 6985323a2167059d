"""`cifar10`, `fashion_mnist` and `gtsrb`: found on disk or downloaded, checked, converted once, then read from a cache.

    train, test = load_real("cifar10")       # looks under BDLIB_DATA, in the layout of torchvision

The folder may hold ``cifar-10-batches-py/``, ``FashionMNIST/raw/`` and ``gtsrb/``.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bdlib import files

from . import cache, fetch
from .cache import Converted, DamagedCache
from .imageset import Data, ImageSet
from .sources import SOURCES, SUBSET, find, stamp_of


def data_folder() -> Path:
    """Where original files are looked for: ``$BDLIB_DATA``, by default ``~/.cache/bdlib/downloads``."""
    data = os.environ.get("BDLIB_DATA")
    return Path(data).expanduser() if data else files.user_folder() / "downloads"


def _data(name: str, c: Converted) -> Data:
    spec = SOURCES[name]
    pair = ((c.train_images, c.train_labels), (c.test_images, c.test_labels))
    train, test = (ImageSet(x, y, spec.classes, name, spec.augment, c.facts.notes) for x, y in pair)
    return Data(train, test)


def _from_cache(name: str, source: list[Path] | None, verify: bool) -> Converted | None:
    """The converted set, unless it was made from other files than those at hand."""
    path = cache.cache_path(name)
    hit = cache.read(path)
    if hit is None or (source is not None and hit.facts.source != stamp_of(source)):
        return None
    if verify and hit.facts.unverified:
        if source is not None:
            return None  # the source is checked again, and the error lists its sums
        raise ValueError(
            f"{name}: {path} was converted with verify=False: {'; '.join(hit.facts.unverified)}. "
            "Load it with verify=False (command line: --no-verify), and the notes of the set and every record will "
            f"say so; or delete it, put the official files under {data_folder()}, and load again"
        )
    return hit


def load_real(name: str, *, verify: bool = True) -> Data:
    """`cifar10`, `fashion_mnist` or `gtsrb`, see `bdlib.data.load`."""
    folder, path, damage = data_folder(), cache.cache_path(name), ""
    source = find(name, folder)
    try:
        hit = _from_cache(name, source, verify)
        if hit is not None:
            return _data(name, hit)
    except DamagedCache as error:
        damage = str(error)
        if source is not None:
            warnings.warn(f"{damage}; it is made again from {folder}", stacklevel=3)
    if source is None:
        fetch.download(name, folder, looked_for=SOURCES[name].layout, cached=damage or f"no converted copy at {path}")
        source = find(name, folder)
        if source is None:
            raise FileNotFoundError(f"{name}: the download is complete, but {folder} lacks {SOURCES[name].layout}")
    converted = SOURCES[name].read(folder, stamp_of(source), verify)
    try:
        data = _data(name, converted)  # checks the labels before anything is kept
    except ValueError as error:
        raise ValueError(f"{name}: the files under {folder} are damaged: {error}") from None
    try:
        cache.write(path, converted)
    except OSError as error:
        warnings.warn(
            f"{name} is loaded, but its converted copy could not be written to {path.parent} ({error}), so every load "
            "converts it again; free disk space there, or set BDLIB_STORE to a writable folder",
            stacklevel=3,
        )
    return data


def real_status(name: str) -> dict:
    """One entry of `bdlib.data.status`."""
    spec, folder, path = SOURCES[name], data_folder(), cache.cache_path(name)
    source, kept = find(name, folder), cache.summary(path)
    entry: dict[str, Any] = {"name": name, "state": "absent", "where": str(folder)}
    entry |= {"train": spec.sizes[0], "test": spec.sizes[1], "classes": len(spec.classes)}
    entry |= {"shape": spec.shape, "notes": ()}
    if kept is not None and (source is None or kept[0].source == stamp_of(source)):
        facts, shapes = kept
        entry |= {"state": "cached", "where": str(path), "notes": facts.notes}
        entry |= {"train": shapes["train_labels"][0], "test": shapes["test_labels"][0]}
    elif source is not None:
        entry |= {"state": "on disk", "where": str(source[0].parent)}
        if source[0].name == SUBSET:
            try:
                with np.load(source[0], allow_pickle=False) as file:
                    entry |= {"train": len(file["y_train"]), "test": len(file["y_test"]), "notes": ("GTSRB subset",)}
            except Exception as error:  # listing must not fail because one file is damaged
                entry["notes"] = (f"{source[0]} is damaged: {error}",)
    return entry
