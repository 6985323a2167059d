"""Image sets: what they hold, what they refuse, what a damaged disk, file or network does to them."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bdlib import files
from bdlib.data import Augment, CleanSet, ImageSet, cache, clean_set, fetch, load, names, sources, status
from bdlib.data.imageset import FOLDS, KFOLD_BELOW
from bdlib.data.unpickle import array_pickle

torchvision = pytest.importorskip("torchvision")

REAL = os.environ.get("BDLIB_DATA")  # read before the fixture below hides it
BATCH_SIZE = 4  # images in a fabricated CIFAR batch


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Folders of this test's own, and no network but this machine's own address."""
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    look_up = socket.getaddrinfo

    def local_only(host, *args, **kwargs):
        if host == "127.0.0.1":
            return look_up(host, *args, **kwargs)
        raise socket.gaierror(-3, "no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", local_only)


# fabricated sources


def _batches(seed: int = 0) -> dict[str, dict]:
    rng = np.random.default_rng(seed)
    return {
        name: {
            "data": rng.integers(0, 256, (BATCH_SIZE, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, BATCH_SIZE).tolist(),
        }
        for name in sources.BATCHES
    }


def _write_cifar(folder: Path, batches: dict[str, dict]) -> Path:
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    return base


def _trust(monkeypatch, base: Path) -> None:
    """Make the fabricated batches the official ones."""
    md5 = [[name, hashlib.md5((base / name).read_bytes()).hexdigest()] for name in sources.BATCHES]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", md5[:5])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", md5[5:])


@pytest.fixture
def cifar(tmp_path) -> Path:
    """Six small batches whose md5 is not torchvision's."""
    return _write_cifar(tmp_path / "data", _batches())


@pytest.fixture
def official(cifar, monkeypatch) -> Path:
    """Six small batches that pass the md5 check."""
    _trust(monkeypatch, cifar)
    return cifar


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_fashion(folder: Path, monkeypatch, packed: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays, md5 = {}, {}
    for name in sources.IDX_MD5:
        shape = (6, 28, 28) if "images" in name else (6,)
        arrays[name] = rng.integers(0, 10, shape, dtype=np.uint8)
        content = _idx(arrays[name])
        md5[name] = hashlib.md5(content).hexdigest()
        path = raw / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    monkeypatch.setattr(sources, "IDX_MD5", md5)
    return arrays


def _write_npz(folder: Path, **changes) -> Path:
    rng = np.random.default_rng(2)
    arrays = {}
    for part, n in (("train", 86), ("test", 43)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.sort(np.arange(n, dtype=np.int64) % 43)
    path = folder / "gtsrb" / sources.SUBSET
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(arrays | changes))
    return path


# names and built-in sets


def test_names_are_loadable_or_refused_with_the_list():
    assert names() == ("signs", "digits", "cifar10", "fashion_mnist", "gtsrb")
    with pytest.raises(ValueError, match=r"signs, digits, cifar10, fashion_mnist, gtsrb, got 'cifar100'"):
        load("cifar100")


def test_import_is_light():
    code = "import sys, bdlib.data; print(*{'torchvision', 'sklearn', 'PIL', 'matplotlib'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_digits():
    pytest.importorskip("sklearn")
    train, test = load("digits")
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    assert train.classes[3] == "three" and not train.augment.flip
    counts = torch.bincount(test.labels)
    assert counts.min() >= 34 and counts.max() <= 37  # a fifth of each class
    assert load("digits").test.fingerprint() == test.fingerprint()
    assert int(train.images.min()) == 0 and int(train.images.max()) == 255
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    both = {bytes(x) for x in train.images.flatten(1).numpy()} & {bytes(x) for x in test.images.flatten(1).numpy()}
    assert not both


def test_digits_are_enlarged_bilinearly_in_integers():
    from bdlib.data.digits import _enlarge

    coarse = np.random.default_rng(0).integers(0, 17, (20, 8, 8))
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[:, None] * (255 / 16), scale_factor=4.0, mode="bilinear"
    )
    assert (torch.from_numpy(_enlarge(coarse)).double() - smooth[:, 0]).abs().max() <= 0.5 + 1e-9
    assert (_enlarge(np.full((1, 8, 8), 16)) == 255).all()


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load("digits")


def test_a_real_set_without_torchvision_says_what_to_install(cifar, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load("cifar10")


def test_device(official, device):
    train, test = load("cifar10", device=device)
    assert {train.images.device.type, train.labels.device.type, test.images.device.type} == {device}


# CIFAR-10


def test_cifar10_is_read_in_order(official):
    train, test = load("cifar10")
    batches = _batches()
    rows = np.concatenate([batches[name]["data"] for name in sources.BATCHES[:5]])
    assert np.array_equal(train.images.flatten(1).numpy(), rows)
    assert test.labels.tolist() == batches["test_batch"]["labels"]
    assert train.shape == (3, 32, 32) and train.classes[9] == "truck" and train.notes == ()
    assert train.augment == Augment(pad=4, flip=True)


def test_cifar10_with_another_md5_is_refused_by_name(cifar, tmp_path):
    found = hashlib.md5((cifar / "data_batch_2").read_bytes()).hexdigest()
    with pytest.raises(ValueError) as error:
        load("cifar10")
    message = str(error.value)
    for part in ("data_batch_2", found, "d4bba439e000b95fd0a9bffe97cbabec", "verify=False", "--no-verify", str(cifar)):
        assert part in message
    assert not (tmp_path / "store").exists()


def test_cifar10_unverified_says_so(cifar):
    (cifar / sources.LOSSY).write_text(json.dumps({"train": [1, 2, 3], "test": [0]}))
    for _ in range(2):  # converted, then cached
        data = load("cifar10", verify=False)
        for part in data:
            assert "md5 of data_batch_1, " in part.notes[0] and "loaded with verify=False" in part.notes[0]
            assert part.notes[1] == "3 train and 1 test images are inexact"


def test_notes_name_only_the_batches_that_differ(official):
    (official / "data_batch_3").write_bytes(pickle.dumps(_batches(seed=9)["data_batch_3"], protocol=2))
    assert load("cifar10", verify=False).train.notes == (
        "md5 of data_batch_3 differs from the official archive; loaded with verify=False",
    )


def test_an_unreadable_list_of_inexact_images_is_noted(cifar):
    (cifar / sources.LOSSY).write_text("not JSON")
    assert "cannot be read" in load("cifar10", verify=False).test.notes[1]


def test_the_cache_does_not_launder_unverified_data(cifar):
    load("cifar10", verify=False)
    with pytest.raises(ValueError, match="md5 is"):
        load("cifar10")
    for file in cifar.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"was converted with verify=False: md5 of data_batch_1.*delete it"):
        load("cifar10")
    assert load("cifar10", verify=False).train.notes


def test_verified_files_are_not_marked_by_verify_false(official):
    (official / sources.LOSSY).write_text(json.dumps({"train": [1], "test": []}))  # left over from a rebuilt copy
    assert load("cifar10", verify=False).train.notes == ()
    assert load("cifar10").train.notes == ()


class _Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, subprocess.check_call], ids=lambda f: f.__name__)
def test_a_malicious_batch_is_refused_and_not_run(cifar, tmp_path, function, protocol):
    marker = tmp_path / "owned"
    argument = {"eval": f"open({str(marker)!r}, 'w')", "check_call": ["touch", str(marker)]}
    payload = _Runs(function, argument.get(function.__name__, f"touch {marker}"))
    poisoned = pickle.dumps(_batches()["data_batch_4"] | {"batch_label": payload}, protocol=protocol)
    pickle.loads(poisoned)  # the attack is real ...
    for _ in range(50):
        if marker.exists():
            break
        time.sleep(0.02)
    marker.unlink()
    (cifar / "data_batch_4").write_bytes(poisoned)
    with pytest.raises(ValueError, match=rf"data_batch_4.*{function.__name__}, which is refused"):
        load("cifar10", verify=False)
    assert not marker.exists()  # ... and harmless here
    with pytest.raises(ValueError, match="verify=False"):
        load("cifar10")
    assert not marker.exists()


def test_array_pickle_admits_no_numpy_but_the_array_builders():
    for name in (
        "numpy\nload",
        "numpy\nfromfile",
        "numpy._core.multiarray\nscalar",
        "builtins\ngetattr",
        "numpy\nndarray.tofile",
    ):
        with pytest.raises(ValueError, match="refused"):
            array_pickle(b"\x80\x02c" + name.encode() + b"\n.")


def test_array_pickle_admits_integers_only():
    for array in (np.array([{}]), np.zeros(3), np.zeros(3, "U4"), np.zeros(3, [("a", "u1")])):
        with pytest.raises(ValueError, match="not a readable pickle of arrays"):
            array_pickle(pickle.dumps({"data": array}, protocol=2))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_array_pickle_reads_what_numpy_writes(protocol):
    arrays = {
        "bytes": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
        "other end first": np.arange(5, dtype=">i4"),
    }
    read = array_pickle(pickle.dumps(arrays | {"list": [1, 2]}, protocol=protocol))
    assert all(np.array_equal(read[k], arrays[k]) for k in arrays) and read["list"] == [1, 2]


def test_array_pickle_reads_what_python_2_wrote():
    rows = bytes(range(256)) * 24  # two images
    raw = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    raw += b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    raw += (
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", len(rows))
        + rows
        + b"tbU\x06labels](K\x06K\x09eu."
    )
    batch = array_pickle(raw)
    assert batch["data"].shape == (2, 3072) and batch["data"].tobytes() == rows and batch["labels"] == [6, 9]


@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_array_pickle_survives_any_bytes(noise, place):
    raw = bytearray(pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [1, 2]}, protocol=2))
    place %= len(raw)
    raw[place : place + len(noise)] = noise
    for candidate in (noise, bytes(raw), bytes(raw[:place])):
        with contextlib.suppress(ValueError):
            assert isinstance(array_pickle(candidate), dict)


@pytest.mark.parametrize(
    "change",
    [
        {"data": None},
        {"data": np.zeros((BATCH_SIZE, 3071), np.uint8)},
        {"data": np.zeros((BATCH_SIZE + 1, 3072), np.uint8)},
        {"data": np.zeros((BATCH_SIZE, 3072), np.int64)},
        {"labels": None},
        {"labels": ["x"] * BATCH_SIZE},
        {"labels": [10] * BATCH_SIZE},
        {"labels": [-1] * BATCH_SIZE},
    ],
)
def test_a_batch_of_the_wrong_content_is_refused(cifar, tmp_path, change):
    (cifar / "test_batch").write_bytes(pickle.dumps(_batches()["test_batch"] | change, protocol=2))
    with pytest.raises(ValueError, match=r"cifar10: .*damaged"):
        load("cifar10", verify=False)
    assert not (tmp_path / "store").exists()


def test_a_truncated_batch_is_refused(cifar):
    path = cifar / "data_batch_5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="data_batch_5 is damaged"):
        load("cifar10", verify=False)


# Fashion-MNIST and GTSRB


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist(tmp_path, monkeypatch, packed):
    arrays = _write_fashion(tmp_path / "data", monkeypatch, packed)
    train, test = load("fashion_mnist")
    assert train.shape == (1, 28, 28) and train.classes[9] == "ankle boot" and train.notes == ()
    assert np.array_equal(train.images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])


def test_fashion_mnist_with_another_md5(tmp_path, monkeypatch):
    _write_fashion(tmp_path / "data", monkeypatch)
    (tmp_path / "data/FashionMNIST/raw/t10k-labels-idx1-ubyte").write_bytes(_idx(np.zeros(6, np.uint8)))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte: md5 is (?s:.)*--no-verify"):
        load("fashion_mnist")
    assert load("fashion_mnist", verify=False).test.notes == (
        "md5 of t10k-labels-idx1-ubyte differs from the official archive; loaded with verify=False",
    )


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x09abc", b"\0\0\x0d\x01\0\0\0\0", b"\0\0\x08\x03" + b"\xff" * 12]
)
def test_a_damaged_idx_file_is_refused(tmp_path, monkeypatch, raw):
    _write_fashion(tmp_path / "data", monkeypatch)
    (tmp_path / "data/FashionMNIST/raw/train-labels-idx1-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        load("fashion_mnist", verify=False)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    _write_fashion(tmp_path / "data", monkeypatch)
    (tmp_path / "data/FashionMNIST/raw/train-labels-idx1-ubyte").write_bytes(_idx(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="fashion_mnist: the files under"):
        load("fashion_mnist", verify=False)


def test_a_truncated_gz_is_refused(tmp_path, monkeypatch):
    _write_fashion(tmp_path / "data", monkeypatch, packed=True)
    path = tmp_path / "data/FashionMNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load("fashion_mnist", verify=False)


def test_gtsrb_subset(tmp_path):
    path = _write_npz(tmp_path / "data")
    train, test = load("gtsrb")
    assert train.images.shape == (86, 3, 32, 32) and len(test) == 43 and len(set(train.classes)) == 43
    assert "GTSRB subset: 86 training and 43 test images" in train.notes[0] and not train.augment.flip
    assert train.labels.tolist() != sorted(train.labels.tolist())  # shuffled
    with np.load(path) as file:
        pairs = {
            (int(y), x.transpose(2, 0, 1).tobytes()) for x, y in zip(file["x_train"], file["y_train"], strict=True)
        }
    assert {(int(y), x.numpy().tobytes()) for x, y in zip(train.images, train.labels, strict=True)} == pairs


@pytest.mark.parametrize(
    "changes",
    [
        {"x_train": np.array([{}], dtype=object)},
        {"y_test": np.array([os.getcwd], dtype=object)},
        {"x_test": np.zeros((43, 32, 32), np.uint8)},
        {"x_train": np.zeros((86, 32, 32, 3), np.float32)},
        {"y_train": np.full(86, 43)},
    ],
)
def test_a_gtsrb_file_of_the_wrong_content_is_refused(tmp_path, changes):
    _write_npz(tmp_path / "data", **changes)
    with pytest.raises(ValueError, match=r"gtsrb: .*damaged"):
        load("gtsrb")


def test_a_truncated_or_pickled_npz_is_refused(tmp_path):
    path = _write_npz(tmp_path / "data")
    whole = path.read_bytes()
    for raw in (b"", whole[: len(whole) // 2], pickle.dumps(_Runs(os.system, f"touch {tmp_path / 'owned'}"))):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{sources.SUBSET} is damaged"):
            load("gtsrb")
    assert not (tmp_path / "owned").exists()


def _write_ppm(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(3)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for k in range(43):
        for sub, name in ((f"GTSRB/Training/{k:05d}", "0.ppm"), ("GTSRB/Final_Test/Images", f"{k:05d}.ppm")):
            path = folder / "gtsrb" / sub / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        rows.append(f"{k:05d}.ppm;50;40;5;5;45;35;{42 - k}")
    (folder / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows) + "\n")


def test_gtsrb_of_torchvision_is_resized(tmp_path):
    _write_ppm(tmp_path / "data")
    train, test = load("gtsrb")
    assert train.images.shape == test.images.shape == (43, 3, 32, 32) and "resized" in train.notes[0]
    assert sorted(test.labels.tolist()) == list(range(43)) and "subset" not in train.notes[0]
    (tmp_path / "data/gtsrb/GTSRB/Training/00007/0.ppm").write_bytes(b"P6 broken")
    (tmp_path / "store/data/gtsrb.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gtsrb: the train images under .* are damaged"):
        load("gtsrb")


# the converted copy


def _equal(a, b) -> bool:
    return all(x.fingerprint() == y.fingerprint() and x.notes == y.notes for x, y in zip(a, b, strict=True))


def test_the_converted_copy_serves_without_the_source(official, tmp_path):
    first = load("cifar10")
    for file in official.iterdir():
        file.unlink()
    again = load("cifar10")
    assert _equal(first, again)
    kept = (tmp_path / "store/data/cifar10.safetensors").read_bytes()
    again.train.images.zero_()  # editable, and not the file's memory
    assert (tmp_path / "store/data/cifar10.safetensors").read_bytes() == kept


def test_a_changed_source_is_converted_again(official, monkeypatch):
    before = load("cifar10").train.fingerprint()
    stat = (official / "data_batch_1").stat()
    _write_cifar(official.parent, _batches(seed=5))
    for name in sources.BATCHES:  # archives give every copy the same date: it must not be the only sign
        os.utime(official / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _trust(monkeypatch, official)
    assert load("cifar10").train.fingerprint() != before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-700] ^= 4
    path.write_bytes(raw)


def _forge_notes(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"facts": metadata["facts"].replace('"notes": []', '"notes": ["exact"]')})


def _another_format(path: Path) -> None:
    save_file({"train_images": torch.zeros(1)}, path)


DAMAGES = [_truncate, _empty, _flip_a_bit, _forge_notes, _another_format]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_made_again(official, tmp_path, damage):
    first, path = load("cifar10"), tmp_path / "store/data/cifar10.safetensors"
    damage(path)
    with pytest.warns(UserWarning, match=r"cifar10.safetensors is damaged: .*made again"):
        assert _equal(load("cifar10"), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _equal(load("cifar10"), first)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_without_its_source_is_an_error(official, tmp_path, damage):
    load("cifar10")
    damage(tmp_path / "store/data/cifar10.safetensors")
    (official / "data_batch_1").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"download failed(?s:.)*cifar10.safetensors is damaged(?s:.)*how to get it"
    ):
        load("cifar10")


def test_an_unwritable_cache_folder_loses_nothing(official, tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"could not be written to .*store.*BDLIB_STORE"):
        data = load("cifar10")
    assert len(data.train) == 5 * BATCH_SIZE


def test_a_full_disk_loses_nothing(official, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    old = load("cifar10")
    path = tmp_path / "store/data/cifar10.safetensors"
    kept = path.read_bytes()
    _write_cifar(official.parent, _batches(seed=5))
    _trust(monkeypatch, official)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the write really stops half-way
    try:
        with pytest.warns(UserWarning, match="could not be written"):
            new = load("cifar10")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not _equal(new, old) and len(new.train) == 5 * BATCH_SIZE
    assert path.read_bytes() == kept and list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_half_file(official, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10")
    assert list((tmp_path / "store/data").iterdir()) == []


def test_default_folders_are_the_users_cache(monkeypatch, tmp_path):
    from bdlib.data.real import data_folder

    for variable in ("BDLIB_DATA", "BDLIB_STORE"):
        monkeypatch.setenv(variable, "")  # empty counts as unset
    assert cache.cache_path("gtsrb") == tmp_path / "home/bdlib/data/gtsrb.safetensors"
    assert data_folder() == tmp_path / "home/bdlib/downloads"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.user_folder() == Path.home() / ".cache/bdlib"


# missing sets and downloads


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist", "gtsrb"])
def test_a_missing_set_without_a_network(name, tmp_path):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    assert time.monotonic() - began < 30 and error.value.__suppress_context__
    message = str(error.value)
    for part in (name, "looked in", str(tmp_path / "data"), "looked for", "how to get it", "BDLIB_DATA", "no network"):
        assert part in message
    assert list((tmp_path / "data").iterdir()) == []


def test_an_incomplete_folder_counts_as_missing_and_is_left_alone(official, tmp_path):
    (official / "data_batch_3").unlink()
    before = sorted(p.name for p in official.iterdir())
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        load("cifar10")
    assert sorted(p.name for p in official.iterdir()) == before


def test_an_unwritable_download_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"cannot be downloaded into .*data.*BDLIB_DATA"):
        load("cifar10")


def test_a_full_download_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", full)
    with pytest.raises(OSError, match=r"data .*: the disk is full; free disk space"):
        load("cifar10")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine with a small CIFAR-10 archive, which torchvision takes for the official one."""
    site = tmp_path / "site"
    _trust(monkeypatch, _write_cifar(site, _batches()))
    with tarfile.open(site / "cifar.tar.gz", "w:gz") as tar:
        tar.add(site / "cifar-10-batches-py", "cifar-10-batches-py")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{httpd.server_port}/cifar.tar.gz")
    md5 = hashlib.md5((site / "cifar.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)
    yield site
    httpd.shutdown()
    httpd.server_close()


def test_a_missing_set_is_downloaded_once(server, tmp_path):
    data = load("cifar10")
    assert len(data.train) == 5 * BATCH_SIZE and data.train.notes == ()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]
    (server / "cifar.tar.gz").unlink()
    assert _equal(load("cifar10"), data)


def test_a_download_fills_an_incomplete_folder(server, tmp_path):
    base = _write_cifar(tmp_path / "data", _batches())
    (base / "data_batch_3").unlink()
    (base / "mine").write_text("kept")
    assert len(load("cifar10").train) == 5 * BATCH_SIZE and (base / "mine").read_text() == "kept"


def test_a_damaged_download_leaves_nothing(server, tmp_path):
    path = server / "cifar.tar.gz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(FileNotFoundError, match="download failed: File not found or corrupted"):
        load("cifar10")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_silent_server_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/cifar.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(FileNotFoundError, match=r"download failed: .*timed out"):
            load("cifar10")
    assert socket.getdefaulttimeout() is None


# status


def test_status(official, tmp_path):
    pytest.importorskip("sklearn")
    _write_npz(tmp_path / "data")

    def states():
        entries = status()
        assert [e["name"] for e in entries] == list(names())
        assert all(set(e) == set(entries[0]) for e in entries)
        return {e["name"]: e for e in entries}

    before = states()
    assert [before[name]["state"] for name in names()] == ["built in", "built in", "on disk", "absent", "on disk"]
    assert before["fashion_mnist"]["where"] == str(tmp_path / "data") and before["fashion_mnist"]["train"] == 60000
    assert before["gtsrb"]["train"] == 86 and before["gtsrb"]["notes"] == ("GTSRB subset",)
    load("cifar10")
    after = states()["cifar10"]
    assert after["state"] == "cached" and after["train"] == 5 * BATCH_SIZE and after["shape"] == (3, 32, 32)
    assert after["classes"] == 10 and after["where"].endswith("cifar10.safetensors")
    _truncate(tmp_path / "store/data/cifar10.safetensors")
    (tmp_path / "data/gtsrb" / sources.SUBSET).write_bytes(b"")
    broken = states()
    assert broken["cifar10"]["state"] == "on disk" and "damaged" in broken["gtsrb"]["notes"][0]


@pytest.mark.slow
def test_status_tells_the_truth_about_built_in_sets():
    pytest.importorskip("sklearn")
    for entry in status()[:2]:
        train, test = load(entry["name"])
        assert (len(train), len(test), train.shape) == (entry["train"], entry["test"], entry["shape"])
        assert len(train.classes) == entry["classes"]


# image sets and the defender's clean images


def _pool(labels: list[int], classes: int) -> ImageSet:
    """Images that carry their own index."""
    n = torch.arange(len(labels))
    images = torch.stack([n // 256, n % 256], 1).to(torch.uint8)[:, None, None]  # (N, 1, 1, 2)
    return ImageSet(images, torch.tensor(labels), tuple(f"c{k}" for k in range(classes)), "toy")


def _ids(part: ImageSet) -> list[int]:
    pairs = part.images.flatten(1).long()
    return (pairs[:, 0] * 256 + pairs[:, 1]).tolist()


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (torch.zeros(2, 3, 4, 4), [0, 1], "images must be uint8 .*float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 1], r"\(N, C, H, W\), got .*\(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 1, 0], r"labels must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0.0, 1.0], "labels must be int64"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 2], r"labels must lie in \[0, 1\], got 0 to 2"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [-1, 1], r"labels must lie in \[0, 1\], got -1 to 1"),
    ],
)
def test_an_image_set_refuses_wrong_tensors(images, labels, match):
    with pytest.raises(ValueError, match=match):
        ImageSet(images, torch.tensor(labels), ("a", "b"), "toy")


@pytest.mark.parametrize("name", ["pad", "cutout"])
def test_an_augmentation_refuses_negative_pixels(name):
    with pytest.raises(ValueError, match=f"{name} must be 0 or more pixels, got -1"):
        Augment(**{name: -1})


def test_views_of_an_image_set():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    data = ImageSet(images, torch.tensor([0, 1]), ("a", "b"), "toy", notes=("n",))
    assert data[1:].notes == ("n",) and len(data[torch.tensor([True, False])]) == 1
    assert data.floats.dtype == torch.float32 and float(data.floats.max()) == pytest.approx(95 / 255)
    mean, std = data.stats()
    assert len(mean) == len(std) == 3
    assert mean[0] == pytest.approx(float(data.floats[:, 0].mean()), abs=1e-4)
    other = images.clone()
    other[0, 0, 0, 0] += 1
    assert data.fingerprint() != ImageSet(other, data.labels, ("a", "b"), "toy").fingerprint()


@st.composite
def _pools(draw) -> ImageSet:
    """A pool in which every class has at least four images."""
    classes = draw(st.integers(2, 6))
    extra = draw(st.lists(st.integers(0, classes - 1), max_size=300))
    return _pool(draw(st.permutations([*range(classes)] * 4)) + extra, classes)


def _check_parts(clean: CleanSet) -> None:
    """Nothing is learnt from and chosen on; the parts cover the budget; folds share their select images out."""
    everything, folds = sorted(_ids(clean.images)), clean.folds()
    assert len(set(everything)) == len(everything)
    assert len(folds) == (1 if len(clean) >= KFOLD_BELOW else FOLDS)
    for learn, select in folds:
        assert len(learn) and len(select)
        assert sorted(_ids(learn) + _ids(select)) == everything
    if len(folds) > 1:
        assert sorted(i for _, select in folds for i in _ids(select)) == everything
    assert _ids(clean.learn) == _ids(folds[0][0]) and _ids(clean.select) == _ids(folds[0][1])


@given(_pools(), st.data(), st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_a_clean_set_per_class(pool, data, seed, held_out):
    least = int(torch.bincount(pool.labels).min())
    k = data.draw(st.integers(2, least))
    clean = clean_set(pool, per_class=k, held_out=held_out, seed=seed)
    assert torch.bincount(clean.images.labels).tolist() == [k] * len(pool.classes)
    assert all(int(pool.labels[i]) == int(y) for i, y in zip(_ids(clean.images), clean.images.labels, strict=True))
    _check_parts(clean)
    assert _ids(clean.images) == _ids(clean_set(pool, per_class=k, held_out=held_out, seed=seed).images)
    with pytest.raises(ValueError, match=rf"per_class must be in \[1, {least}\], got {least + 1}: class 'c\d'"):
        clean_set(pool, per_class=least + 1)


@given(_pools(), st.data(), st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_a_clean_set_by_count_or_fraction(pool, data, seed, held_out):
    count = data.draw(st.integers(FOLDS, len(pool)))
    budget = data.draw(st.sampled_from([{"count": count}, {"fraction": count / len(pool)}]))
    try:
        clean = clean_set(pool, **budget, held_out=held_out, seed=seed)
    except ValueError as error:
        assert "has none of: c" in str(error) and count < len(pool)
        return
    assert len(clean) == count and set(clean.images.labels.tolist()) == set(range(len(pool.classes)))
    _check_parts(clean)
    assert _ids(clean.images) == _ids(clean_set(pool, **budget, held_out=held_out, seed=seed).images)
    if count >= KFOLD_BELOW:
        assert len(clean.select) == max(1, round(count * held_out))


def test_another_seed_draws_other_images():
    pool = _pool([0, 1] * 200, 2)
    draws = {tuple(_ids(clean_set(pool, count=50, seed=seed).images)) for seed in range(5)}
    assert len(draws) == 5


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({}, "exactly one"),
        ({"count": 5, "fraction": 0.1}, "exactly one"),
        ({"count": 0}, r"count must be in \[1, 20\], got 0"),
        ({"count": 21}, r"count must be in \[1, 20\], got 21"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
        ({"per_class": 0}, "per_class must be in"),
        ({"per_class": 11}, r"per_class must be in \[1, 10\], got 11"),
        ({"count": 10, "held_out": 1.0}, r"held_out must be in \(0, 1\), got 1.0"),
        ({"count": 10, "held_out": 0.0}, r"held_out must be in \(0, 1\), got 0.0"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget, match):
    with pytest.raises(ValueError, match=match):
        clean_set(_pool([0, 1] * 10, 2), **budget)


def test_a_clean_set_that_lacks_a_class_is_refused():
    with pytest.raises(ValueError, match="none of: c1; raise the budget or use per_class"):
        clean_set(_pool([0] * 20, 2), count=10)
    with pytest.raises(ValueError, match="class 'c1' has 0 images"):
        clean_set(_pool([0] * 20, 2), per_class=1)


# the real thing, where it is at hand


@pytest.fixture
def real(monkeypatch, tmp_path_factory):
    """The folder of real data, and one store for all tests that read it."""
    if not REAL:
        pytest.skip("BDLIB_DATA is not set: no real data here")
    monkeypatch.setenv("BDLIB_DATA", REAL)
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path_factory.getbasetemp() / "real-store"))

    def get(name: str, part: str):
        if not (Path(REAL) / part).exists():
            pytest.skip(f"no {part} under BDLIB_DATA")
        return load(name, verify=False)

    return get


@pytest.mark.slow
def test_real_cifar10(real):
    train, test = real("cifar10", "cifar-10-batches-py")
    assert torch.bincount(train.labels).tolist() == [5000] * 10 and torch.bincount(test.labels).tolist() == [1000] * 10
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # a frog, two trucks, a deer ...
    mean, std = train.stats()
    assert mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-4)
    assert std == pytest.approx((0.2470, 0.2435, 0.2616), abs=2e-4)
    if (Path(REAL) / "cifar-10-batches-py" / sources.LOSSY).exists():
        assert train.notes[1] == "80 train and 23 test images are inexact"
        with pytest.raises(ValueError, match="--no-verify"):
            load("cifar10")
    else:
        assert train.notes == () and _equal(load("cifar10"), (train, test))


def test_real_fashion_mnist_is_verified(real):
    train, test = real("fashion_mnist", "FashionMNIST/raw")
    assert train.notes == () and _equal(load("fashion_mnist"), (train, test))
    assert torch.bincount(train.labels).tolist() == [6000] * 10 and train.shape == (1, 28, 28)
    assert train.stats() == ((0.286,), (0.353,))


def test_real_gtsrb_subset(real):
    train, test = real("gtsrb", f"gtsrb/{sources.SUBSET}")
    assert (len(train), len(test)) == (12330, 3990) and "GTSRB subset" in train.notes[0]
    assert int(torch.bincount(train.labels).min()) >= 210


def test_real_sets_come_from_the_converted_copy_the_second_time(real, monkeypatch):
    real("gtsrb", f"gtsrb/{sources.SUBSET}")

    def never(*_):
        raise AssertionError("read the source again")

    for name, source in sources.SOURCES.items():
        monkeypatch.setitem(sources.SOURCES, name, sources.Source(**{**vars(source), "read": never}))
    assert len(load("gtsrb").train) == 12330
