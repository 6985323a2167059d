"""Reads CIFAR's pickled batches without running what a pickle may carry.

A pickle is a program: it names functions and calls them while it loads, so a downloaded one can do anything its
reader may do. Here it may name NumPy's three array builders and nothing else, and even those are answered by
stand-ins, so that no line of NumPy runs on a state that a stranger wrote.

    batch = array_pickle(path.read_bytes())      # {"data": (10000, 3072) uint8, "labels": [...], ...}
"""

import io
import pickle
from typing import Any

import numpy as np

_TYPES = {"u1", "i4", "i8"}


class _Dtype:
    """Stands in for `numpy.dtype`: a type code and a byte order."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code = code
        self.order: Any = "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def build(self) -> np.dtype:
        if self.code not in _TYPES or self.order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"an array of type {self.order}{self.code}, only integers are admitted")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """Stands in for `numpy.ndarray`: keeps the array that the state describes."""

    values: np.ndarray

    def __init__(self, *_: Any) -> None:  # also answers `_reconstruct(ndarray, (0,), b"b")`
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as str
        self.values = np.frombuffer(raw, dtype.build()).reshape(shape, order="F" if fortran else "C")


def _encode(text: str, codec: str) -> bytes:
    """Stands in for `_codecs.encode`, with which Python 3 writes bytes into a protocol 2 pickle."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"bytes in codec {codec!r}, only latin1 is admitted")
    return text.encode("latin1")


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is refused: a data batch needs NumPy arrays only, "
                "and a pickle that names anything else may run code"
            ) from None


def array_pickle(raw: bytes) -> dict[str, Any]:
    """The dictionary in a pickle of integer NumPy arrays, lists, strings and numbers; nothing in it is executed.

    Args:
        raw: the bytes of the file (the caller may have checked their md5: the same bytes are read).

    Raises:
        ValueError: the pickle names anything but NumPy's array builders, is cut off, or holds no dictionary.
    """
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"not a readable pickle of arrays: {error or type(error).__name__}") from None
    if not isinstance(batch, dict):
        raise ValueError(f"not a readable pickle of arrays: it holds a {type(batch).__name__}, not a dictionary")
    return {k: getattr(v, "values", None) if isinstance(v, _Array) else v for k, v in batch.items()}
