"""The store: what was saved comes back, what is damaged is made anew, and a store that fails loses no result."""

import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdlib import files, store
from bdlib.attacks import BadNets

FACTS = {"attack": "BadNets", "log": [{"epoch": 1, "loss": 0.25}], "seconds": 1.5}


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(4, 3, 2, 2, generator=g).to(memory_format=torch.channels_last),
        "n": torch.tensor(7),
        "i": torch.randint(9, (5,), generator=g),
        "empty": torch.empty(0, dtype=torch.int64),
    }


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A store of its own for each test."""
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_what_was_saved_comes_back_bit_for_bit(device):
    assert store.load("k") is None
    assert store.save("k", {n: t.to(device) for n, t in tensors().items()}, FACTS)
    got, facts = store.load("k")
    assert same(got, tensors()) and facts == FACTS
    store.save("k", tensors(1), FACTS)
    assert same(store.load("k")[0], tensors(1)) and store.load("other") is None


def test_a_victim_lies_under_the_store_and_leaves_no_other_file(folder):
    store.save("k", tensors(), FACTS)
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["victims/k.safetensors"]
    assert store.path("k").stat().st_mode & 0o777 == 0o644


def test_a_key_stands_for_its_facts_in_any_order():
    key = store.key(a=1, b="x")
    assert key == store.key(b="x", a=1) and len(key) == 24 and int(key, 16) >= 0
    others = [store.key(a=2, b="x"), store.key(a=1, b="y"), store.key(a=1), store.key(a="1", b="x"), store.key()]
    assert len({key, *others}) == 6


@given(st.floats(0, 1), st.floats(0, 1))
def test_keys_of_attacks_differ_when_the_attacks_do(a, b):
    assert (store.key(attack=BadNets(rate=a)) == store.key(attack=BadNets(rate=b))) == (repr(a) == repr(b))


@pytest.mark.parametrize("damage", ["truncated", "altered", "facts altered", "emptied", "another file"])
def test_a_damaged_victim_is_reported_and_counts_as_absent(damage):
    store.save("k", tensors(), FACTS)
    path = store.path("k")
    raw = path.read_bytes()
    path.write_bytes(
        {
            "truncated": raw[: len(raw) // 2],
            "altered": raw[:-1] + bytes([raw[-1] ^ 1]),
            "facts altered": raw.replace(b"BadNets", b"BadNuts"),
            "emptied": b"",
            "another file": b"not a safetensors file at all",
        }[damage]
    )
    with pytest.warns(UserWarning, match=r"k\.safetensors is damaged.*made anew"):
        assert store.load("k") is None
    assert store.save("k", tensors(), FACTS) and same(store.load("k")[0], tensors())  # and is mended


def test_a_store_that_cannot_be_written_costs_a_warning_only(folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"cannot keep the victim in .*victims.*BDLIB_STORE"):
        assert store.save("k", tensors(), FACTS) is False
    assert folder.read_text().startswith("a file") and store.load("k") is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(folder, monkeypatch, step):
    store.save("k", tensors(), FACTS)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, step, full)
    with pytest.warns(UserWarning, match="No space left on device.*Free disk space"):
        assert not store.save("k", tensors(1), FACTS)
    monkeypatch.undo()
    os.environ["BDLIB_STORE"] = str(folder)
    assert same(store.load("k")[0], tensors()) and len(list(folder.rglob("*.*"))) == 1  # no half file


def test_ctrl_c_while_writing_leaves_the_old_victim(folder, monkeypatch):
    store.save("k", tensors(), FACTS)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(files.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save("k", tensors(1), FACTS)
    assert same(store.load("k")[0], tensors()) and len(list(folder.rglob("*.*"))) == 1
