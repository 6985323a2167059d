"""How `cifar10`, `fashion_mnist` and `gtsrb` lie on disk, and how their files are checked and read.

Nothing is unpickled blindly: CIFAR's batches are compared with torchvision's md5 list and read by `array_pickle`,
which admits arrays only; GTSRB's ``.npz`` may hold no pickled object.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import fetch
from .cache import Converted, Facts, to_tensors
from .imageset import Augment
from .unpickle import array_pickle

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
GTSRB_CLASSES = (
    *(f"speed limit {v}" for v in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for lorries",
    "right of way at the next crossing",
    "priority road",
    "give way",
    "stop",
    "no vehicles",
    "no lorries",
    "no entry",
    "danger",
    "bend to the left",
    "bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children",
    "bicycles crossing",
    "snow or ice",
    "wild animals",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight or right",
    "straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for lorries",
)

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
LOSSY = "lossy_indices.json"  # lists the images of a rebuilt copy whose pixels are not the original ones
# md5 of the unpacked files; torchvision lists those of the .gz, from which these were made
IDX_MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
SUBSET = "gtsrb_32x32_subset.npz"
SHUFFLE_SEED = 0  # GTSRB comes sorted by class; shuffled here, a slice of it holds every class


def _md5(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest()


def _differ(name: str, folder: Path, wrong: list[tuple[str, str, str]], verify: bool) -> tuple[str, ...]:
    """One line on the files whose md5 is not the official one; with `verify` an error that lists them."""
    if not wrong:
        return ()
    if verify:
        listed = "\n".join(f"  {file}: md5 is {found}, expected {official}" for file, found, official in wrong)
        raise ValueError(
            f"{name}: files in {folder} are not the official ones:\n{listed}\n"
            "Replace them, or load them all the same with verify=False (command line: --no-verify); "
            "the notes of the set and every record will then say so"
        )
    return (f"md5 of {', '.join(file for file, _, _ in wrong)} differs from the official archive",)


def _lossy_note(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        lists = json.loads(path.read_text())
        return (f"{len(lists['train'])} train and {len(lists['test'])} test images are inexact",)
    except (ValueError, KeyError, TypeError, OSError):
        return (f"{LOSSY} is there but cannot be read: some images are inexact",)


def _batch(path: Path, raw: bytes) -> tuple[np.ndarray, list[int]]:
    """Rows ``(n, 3072)`` uint8 and labels of one CIFAR batch."""
    try:
        content = array_pickle(raw)
        rows, labels = content["data"], [int(v) for v in content["labels"]]
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape != (len(labels), 3072):
            raise ValueError(f"{len(labels)} labels and data of {rows.dtype}, shape {rows.shape}, not uint8 (n, 3072)")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cifar10: {path} is damaged: {error}") from None
    return rows, labels


def _read_cifar10(folder: Path, stamp: str, verify: bool) -> Converted:
    base, official = folder / "cifar-10-batches-py", fetch.cifar10_md5()
    wrong, rows, labels = [], [], []
    for file in BATCHES:
        raw = (base / file).read_bytes()  # hashed and parsed from the same bytes
        if (found := _md5(raw)) != official[file]:
            wrong.append((file, found, official[file]))
        if not (verify and wrong):  # going to be refused: do not even parse it
            x, y = _batch(base / file, raw)
            rows.append(x)
            labels.append(y)
    unverified = _differ("cifar10", base, wrong, verify)
    notes = tuple(f"{line}; loaded with verify=False" for line in unverified)
    notes += _lossy_note(base / LOSSY) if unverified else ()
    train = to_tensors(np.concatenate(rows[:-1]).reshape(-1, 3, 32, 32), [k for batch in labels[:-1] for k in batch])
    test = to_tensors(rows[-1].reshape(-1, 3, 32, 32), labels[-1])
    return Converted(*train, *test, Facts(stamp, notes, unverified))


def _idx(path: Path, raw: bytes) -> np.ndarray:
    """The uint8 array of an IDX file: two zeros, type 8, the number of dimensions, each as four bytes, the values."""
    dims = raw[3] if len(raw) > 3 else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * dims], ">u4").tolist() if len(raw) >= 4 + 4 * dims else []
    if raw[:3] != b"\0\0\x08" or dims not in (1, 3) or len(raw) != 4 + 4 * dims + int(np.prod(shape, dtype=object)):
        raise ValueError(f"fashion_mnist: {path} is damaged: {len(raw)} bytes that are not an IDX file of bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _read_fashion_mnist(folder: Path, stamp: str, verify: bool) -> Converted:
    base, wrong, arrays = folder / "FashionMNIST" / "raw", [], []
    for file, official in IDX_MD5.items():
        path = base / file
        if path.exists():
            raw = path.read_bytes()
        else:
            path = base / f"{file}.gz"
            try:
                raw = gzip.decompress(path.read_bytes())
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"fashion_mnist: {path} is damaged: {error}") from None
        if (found := _md5(raw)) != official:
            wrong.append((file, found, official))
        arrays.append((path, raw))
    unverified = _differ("fashion_mnist", base, wrong, verify)
    notes = tuple(f"{line}; loaded with verify=False" for line in unverified)
    x, y, x_test, y_test = (_idx(path, raw) for path, raw in arrays)
    if x.ndim != 3 or x_test.ndim != 3 or x.shape[1:] != x_test.shape[1:] or y.ndim != 1 or y_test.ndim != 1:
        raise ValueError(f"fashion_mnist: files in {base} have shapes {x.shape}, {y.shape}, {x_test.shape}, ...")
    train, test = to_tensors(x[:, None], y), to_tensors(x_test[:, None], y_test)
    return Converted(*train, *test, Facts(stamp, notes, unverified))


def _shuffled(images: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = to_tensors(images, labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return x[order], y[order]


def _read_gtsrb(folder: Path, stamp: str, verify: bool) -> Converted:
    """The subset in one .npz, or torchvision's folders of .ppm files; neither has an official sum to verify."""
    path = folder / "gtsrb" / SUBSET
    if not path.exists():
        train, test = (_shuffled(*fetch.gtsrb(folder, split)) for split in ("train", "test"))
        return Converted(*train, *test, Facts(stamp, (f"GTSRB resized to 32x32, {len(train[0])} training images",)))
    parts = []
    try:
        with np.load(path, allow_pickle=False) as file:
            for part in ("train", "test"):
                x, y = file[f"x_{part}"], file[f"y_{part}"]
                if x.dtype != np.uint8 or x.shape != (len(y), 32, 32, 3):
                    raise ValueError(f"x_{part} is {x.dtype} of shape {x.shape}, not uint8 ({len(y)}, 32, 32, 3)")
                parts.append(_shuffled(x.transpose(0, 3, 1, 2).copy(), y))
    except Exception as error:  # zip, header or array: a damaged .npz can fail in any way
        raise ValueError(f"gtsrb: {path} is damaged: {error}") from None
    note = f"GTSRB subset: {len(parts[0][1])} training and {len(parts[1][1])} test images, not the standard split"
    return Converted(*parts[0], *parts[1], Facts(stamp, (note,)))


@dataclass(frozen=True)
class Source:
    """What is known of a real set before it is read; sizes and layout are torchvision's."""

    classes: tuple[str, ...]
    augment: Augment
    read: Callable[[Path, str, bool], Converted]
    shape: tuple[int, int, int]
    sizes: tuple[int, int]
    layout: str


SOURCES = {
    "cifar10": Source(
        CIFAR_CLASSES,
        Augment(pad=4, flip=True),
        _read_cifar10,
        (3, 32, 32),
        (50000, 10000),
        f"cifar-10-batches-py/ with {', '.join(BATCHES)}",
    ),
    "fashion_mnist": Source(
        FASHION_CLASSES,
        # a mirrored garment is the same garment; 2 pixels, because it already fills its 28 from edge to edge
        Augment(pad=2, flip=True),
        _read_fashion_mnist,
        (1, 28, 28),
        (60000, 10000),
        f"FashionMNIST/raw/ with {', '.join(IDX_MD5)} (or the same as .gz)",
    ),
    "gtsrb": Source(
        GTSRB_CLASSES,
        Augment(pad=2),  # no flip: keep left is not keep right
        _read_gtsrb,
        (3, 32, 32),
        (26640, 12630),
        f"gtsrb/{SUBSET}, or gtsrb/GTSRB/Training, gtsrb/GTSRB/Final_Test/Images and gtsrb/GT-final_test.csv",
    ),
}


def find(name: str, folder: Path) -> list[Path] | None:
    """The files or folders that the set would be read from, None when one is missing."""
    if name == "cifar10":
        needed = [folder / "cifar-10-batches-py" / file for file in BATCHES]
        extra = [p for p in [folder / "cifar-10-batches-py" / LOSSY] if p.exists()]
    elif name == "fashion_mnist":
        raw = folder / "FashionMNIST" / "raw"
        needed, extra = [p if (p := raw / f).exists() else raw / f"{f}.gz" for f in IDX_MD5], []
    else:
        base = folder / "gtsrb"
        needed, extra = [base / SUBSET], []
        if not needed[0].exists():
            needed = [base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images", base / "GT-final_test.csv"]
    return needed + extra if all(p.exists() for p in needed) else None


def stamp_of(files: list[Path]) -> str:
    """Changes when a source file does. The change time is in it: genuine and rebuilt CIFAR agree in size and date."""
    stats = [(p.name, (s := p.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
