"""Sheets of the gallery: what is written, what is found again, what the distances mean."""

import json

import pytest
import torch
import toys

from bdlib import attacks, files, gallery, speed
from bdlib import data as datasets
from bdlib.__main__ import main
from bdlib.attacks import BadNets, WaNet
from bdlib.data import Data
from bdlib.lab import NETWORKS, Lab
from bdlib.models import normalized
from bdlib.training import Recipe

T = toys.TARGET
KNOWN = {"BadNets": BadNets(T, 0.2, size=3), "WaNet": WaNet(T, 0.2)}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "store"))
    pictures = Data(toys.squares(260), toys.squares(80, seed=1))
    monkeypatch.setattr(datasets, "load", lambda name, device="cpu", verify=True: pictures)
    monkeypatch.setitem(NETWORKS, "tiny", lambda k, mean, std, channels: normalized(toys.Tiny(k), mean, std))
    monkeypatch.setattr(attacks, "every", lambda target=0: KNOWN)
    return Lab("small", device="cpu", recipe=Recipe(1, 32), reserve=60, network="tiny")


def test_distances_of_a_known_change():
    pytest.importorskip("torchmetrics")
    clean = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    changed = clean.clone()
    changed[0] += 10
    changed[1] += 40
    found = gallery.distances(clean, changed)
    squares = [10 * torch.log10(torch.tensor(255**2 / d**2)) for d in (10, 40)]
    assert found["psnr"] == pytest.approx(float(sum(squares) / 2), abs=1e-3) and found["linf"] == 25
    assert 0 < found["ssim"] < 1 and gallery.distances(changed, changed)["ssim"] == pytest.approx(1)


def test_sheets_are_made_once_and_read_back(lab, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    path = tmp_path / "gallery.safetensors"
    with pytest.raises(FileNotFoundError, match="make records"):
        gallery.sheets(path)
    assert gallery.make(lab, path) == 2
    there = gallery.sheets(path)
    assert list(there) == ["BadNets", "WaNet"]
    sheet = there["BadNets"]
    n = len(lab.test.classes)  # the target of `signs` is not among them
    assert sheet.clean.shape == sheet.triggered.shape == (n, 3, 12, 12) and sheet.triggered.dtype == torch.uint8
    trigger = KNOWN["BadNets"].trigger((3, 12, 12), 4)
    assert torch.equal(sheet.triggered, trigger.stamp(sheet.clean))
    assert sheet.poisoned.shape == (gallery.TRAINED, 3, 12, 12)
    assert torch.equal(sheet.poisoned, trigger.stamp(sheet.original)) and sheet.attack == repr(KNOWN["BadNets"])
    assert there["WaNet"].poisoned is None and there["WaNet"].original is None

    monkeypatch.setattr(gallery, "sheet", lambda attack, lab: pytest.fail("made twice"))
    assert gallery.make(lab, path) == 0


def test_a_sheet_of_another_setting_or_of_a_damaged_file_is_made_again(lab, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    path = tmp_path / "gallery.safetensors"
    gallery.make(lab, path)
    other = KNOWN | {"BadNets": BadNets(T, 0.1, size=2)}
    monkeypatch.setattr(attacks, "every", lambda target=0: other)
    assert gallery.make(lab, path) == 1
    assert gallery.sheets(path)["BadNets"].attack == repr(other["BadNets"]) and "WaNet" in gallery.sheets(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(files.DamagedFile):
        gallery.sheets(path)
    assert gallery.make(lab, path) == 2 and len(gallery.sheets(path)) == 2


def test_the_committed_sheets_are_those_of_the_records():
    lab = Lab("small", device="cpu")
    there, known = gallery.sheets(), attacks.every(lab.target)
    assert list(there) == list(known) and not gallery.missing(lab)
    for name, sheet in there.items():
        assert sheet.attack == repr(known[name]), name
        assert sheet.clean.shape == sheet.triggered.shape == (gallery.TEST, 3, 32, 32)
        assert not torch.equal(sheet.clean, sheet.triggered) and 10 < sheet.psnr < 70 and 0 < sheet.ssim <= 1
        assert (sheet.poisoned is None) == (not hasattr(known[name], "poison"))


def test_listing_the_gallery_computes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(gallery, "sheet", lambda attack, lab: pytest.fail("made"))
    assert main(["bench", "gallery", "--list"]) == 0
    assert "0 sheets made, missing or stale: none" in capsys.readouterr().out


def test_the_speed_of_triggers_is_a_table(monkeypatch):
    monkeypatch.setattr(attacks, "every", lambda target=0: KNOWN)
    monkeypatch.setattr(speed, "_median_seconds", lambda work, clock=None: work() and 0.5)
    result = speed.poisoning(toys.squares(600))
    assert result["images"] == 600 and result["images_per_second"]["WaNet"] == 1200
    assert set(result["images_per_second"]) == {"BadNets", "WaNet", "BPP, dithered"}
    text = speed.report_poisoning(json.loads(json.dumps(result)))
    assert "over 600 images" in text and "1,200" in text
