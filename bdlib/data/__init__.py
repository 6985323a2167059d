"""Image sets by name, and the clean images that a defender may draw from them.

    train, test = load("signs")
    clean = clean_set(train, count=500, seed=0)

`names()` lists the sets, `status()` says which of them are on this machine.
"""

from .imageset import Augment, CleanSet, Data, ImageSet, clean_set

__all__ = ["Augment", "CleanSet", "Data", "ImageSet", "clean_set", "load", "names", "status"]

_NAMES = ("signs", "digits", "cifar10", "fashion_mnist", "gtsrb")


def names() -> tuple[str, ...]:
    """What `load` accepts; the first two need no download."""
    return _NAMES


def load(name: str, *, device: str = "cpu", verify: bool = True) -> Data:
    """A training and a test set, uint8 on a device.

    Args:
        name: one of `names()`. ``signs`` is drawn by the library, ``digits`` comes with scikit-learn; the others are
            read from ``BDLIB_DATA``, or downloaded into it on first use (by default into the user's cache folder).
        device: where the tensors live.
        verify: refuse files that differ from the official ones. With False they are read all the same
            (CIFAR's pickles by a reader that admits arrays only), and the sets' `notes` say so.

    Raises:
        ValueError: unknown name; a source file that is damaged, or not the official one while `verify` is on.
        FileNotFoundError: the set is not on this machine and cannot be downloaded.
        OSError: the download folder cannot be written.
        ImportError: scikit-learn or torchvision is needed and not installed.
    """
    # each set is imported on use: torchvision and scikit-learn are optional
    if name == "signs":
        from .signs import signs

        data = signs()
    elif name == "digits":
        from .digits import digits

        data = digits()
    elif name in _NAMES:
        from .real import load_real

        data = load_real(name, verify=verify)
    else:
        raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {name!r}")
    return Data(data.train.to(device), data.test.to(device))


def status() -> list[dict]:
    """One dictionary per set: name, state, where, train, test, shape, classes, notes; nothing is downloaded.

    `state` is "built in", "cached" (converted), "on disk" (found, not yet converted), "absent" (a load would
    download it) or "needs scikit-learn"; `train` and `test` are numbers of images (the official ones when the set
    is absent), `shape` is (C, H, W), `classes` the number of classes.
    """
    from importlib.util import find_spec

    from .real import real_status
    from .signs import CLASSES

    shape = (3, 32, 32)
    common = {"shape": shape, "notes": ()}
    have = find_spec("sklearn") is not None
    return [
        {"name": "signs", "state": "built in", "where": "drawn by bdlib", "train": 6000, "test": 2000}
        | {"classes": len(CLASSES)}
        | common,
        {"name": "digits", "state": "built in" if have else "needs scikit-learn", "where": "scikit-learn"}
        | {"train": 1437, "test": 360, "classes": 10}
        | common,
        *(real_status(name) for name in _NAMES[2:]),
    ]
