"""Victims on disk: trained once for a configuration and its code, found again afterwards.

    victim = store.load(key) or train_it()
    store.save(key, tensors, facts)

A file holds a network's weights and what its attack learnt (safetensors, nothing is unpickled), with a SHA-256; it is
written whole or not at all. The key contains the fingerprint of the code, so nothing stale is served.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from bdlib import files


def key(**facts: Any) -> str:
    """24 hex digits that stand for these facts (anything JSON can hold, and frozen dataclasses by their repr)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()[:24]


def path(name: str) -> Path:
    """The file of a victim; it need not exist."""
    return files.store_folder() / "victims" / f"{name}.safetensors"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts stored under this key; None when there are none.

    A truncated or altered file is reported by a warning, and counts as absent: the caller makes it anew.
    """
    try:
        return files.read(path(name))
    except files.DamagedFile as error:
        warnings.warn(f"{error}; it is made anew", stacklevel=2)
        return None


def save(name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> bool:
    """Keep a victim. A store that cannot be written costs a warning, never the result.

    Returns:
        Whether it was stored.
    """
    try:
        files.write(path(name), tensors, facts)
        return True
    except OSError as error:
        where, why = path(name).parent, os.strerror(error.errno) if error.errno else error
        warnings.warn(
            f"cannot keep the victim in {where} ({why}); the result is used, but will be computed again. "
            "Free disk space, or set BDLIB_STORE to a folder that can be written",
            stacklevel=2,
        )
        return False
