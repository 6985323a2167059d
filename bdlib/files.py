"""Files that are whole or absent: tensors and JSON facts in one checksummed safetensors file, written atomically.

write(path, {"images": images}, {"source": "..."})
tensors, facts = read(path)                       # or DamagedFile
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class DamagedFile(ValueError):
    """A file is truncated, altered or unreadable."""


def user_folder() -> Path:
    """``$XDG_CACHE_HOME/bdlib``, by default ``~/.cache/bdlib``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bdlib"


def store_folder() -> Path:
    """Where victims, triggers and converted sets live: ``$BDLIB_STORE``, by default the user's cache folder."""
    store = os.environ.get("BDLIB_STORE")
    return Path(store).expanduser() if store else user_folder()


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all; an older one stays until the new one is complete on disk.

    Raises:
        OSError: the folder cannot be written, or the disk is full. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}.tmp")  # its own name: two processes may write at once
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: never leave half a file
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    h = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        h.update(repr((name, str(tensors[name].dtype), tuple(tensors[name].shape))).encode())
        h.update(tensors[name].numpy().tobytes())
    return h.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts (anything JSON can hold) with a SHA-256 over both. Raises OSError as `write_bytes`."""
    # copies: safetensors refuses tensors that share memory or are not contiguous (channels_last)
    owned = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    text = json.dumps(facts, sort_keys=True)
    write_bytes(path, save(owned, {"facts": text, "sha256": _digest(owned, text)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (in memory of their own, on the CPU) and facts; None when there is no such file.

    Raises:
        DamagedFile: the file is there and is not what was written.
    """
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # own memory: a mapped tensor would change, or crash, with the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no iterator)
        if _digest(tensors, metadata["facts"]) != metadata["sha256"]:
            raise ValueError("its SHA-256 differs from the stored one")
        return tensors, json.loads(metadata["facts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"the file {path} is damaged: {error}") from None
