"""The parts of torchvision that the real sets need: addresses, md5 sums, downloads, and GTSRB's folders of images."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
from tqdm.auto import tqdm

TIMEOUT = 15  # seconds without a byte from the server before a download is given up
_NO_NETWORK = (URLError, HTTPException, TimeoutError, ConnectionError, socket.gaierror)


def _datasets() -> ModuleType:
    try:
        import torchvision.datasets
    except ImportError:
        raise ImportError("the real image sets need torchvision: pip install torchvision") from None
    return torchvision.datasets


def cifar10_md5() -> dict[str, str]:
    """torchvision's md5 of each of CIFAR-10's batch files."""
    cifar = _datasets().CIFAR10
    return dict(cifar.train_list + cifar.test_list)


def gtsrb(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """All images of a split of torchvision's GTSRB, resized: ``(N, 3, 32, 32)`` uint8, and their labels."""
    try:
        images = _datasets().GTSRB(str(folder), split, transform=lambda im: np.asarray(im.resize((32, 32), 2)))
        # 2 is PIL's bilinear filter, which averages over the source pixels when it makes an image smaller
        pairs = [images[i] for i in tqdm(range(len(images)), desc=f"gtsrb {split}: resizing", unit="image")]
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"gtsrb: the {split} images under {folder / 'gtsrb'} are damaged: {error}") from None
    return np.stack([x for x, _ in pairs]).transpose(0, 3, 1, 2), [y for _, y in pairs]


def _fetch(name: str, folder: Path) -> None:
    datasets = _datasets()
    if name == "cifar10":  # the archive only: torchvision's own reader would unpickle it
        cifar, get = datasets.CIFAR10, datasets.utils.download_and_extract_archive
        get(cifar.url, str(folder), filename=cifar.filename, md5=cifar.tgz_md5, remove_finished=True)
    elif name == "fashion_mnist":
        datasets.FashionMNIST(str(folder), download=True)
    else:
        for split in ("train", "test"):
            datasets.GTSRB(str(folder), split, download=True)


def _merge(source: Path, target: Path) -> None:
    """Move what is not yet in `target` into it; each move is a rename on the same disk."""
    if not target.exists():
        os.replace(source, target)
    elif source.is_dir():
        for entry in sorted(source.iterdir()):
            _merge(entry, target / entry.name)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout: without one a silent firewall would hang the download."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(name: str, folder: Path, *, looked_for: str, cached: str) -> None:
    """Download a set through torchvision into `folder`: whole, or not at all.

    Args:
        name: cifar10, fashion_mnist or gtsrb.
        folder: made if needed; files that are already in it stay.
        looked_for: the files that were not found, for the message.
        cached: what is known of the converted copy, for the message.

    Raises:
        FileNotFoundError: the download failed; says what was looked for, where, and how to get it.
        OSError: the folder cannot be written, or the disk is full.
    """
    where = f"{folder} ({'BDLIB_DATA' if os.environ.get('BDLIB_DATA') else 'BDLIB_DATA is not set; the default'})"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary, _patience(TIMEOUT):
            _fetch(name, Path(temporary))
            for entry in sorted(Path(temporary).iterdir()):
                _merge(entry, folder / entry.name)
    except (*_NO_NETWORK, RuntimeError) as error:
        reason = str(getattr(error, "reason", error)).strip().replace("\n", " ") or type(error).__name__
        raise FileNotFoundError(
            f"{name} is not on this machine, and its download failed: {reason}\n"
            f"  looked in: {where}\n"
            f"  looked for: {looked_for}; {cached}\n"
            "  how to get it: connect to the internet and load it again, or copy these files from another machine "
            "(torchvision.datasets downloads them in this layout) and set BDLIB_DATA to the folder that holds them"
        ) from None
    except OSError as error:
        problem = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise OSError(
            f"{name} cannot be downloaded into {where}: {problem}; "
            "free disk space there, or set BDLIB_DATA to a folder that can be written"
        ) from None
