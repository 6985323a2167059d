"""The tables that pages make of the committed records say what the records say."""

import json

import pytest
import recordext
from conftest import ROOT

RESULTS = ROOT / "book" / "results"
CELL = {
    "dataset": "cifar10", "network": "small", "attack": "badnets", "rate": None, "defence": "ft", "clean": "500",
    "seed": 0, "clean_images": 500, "before": {"acc": 0.80, "asr": 1.0}, "after": {"acc": 0.70, "asr": 0.5},
    "seconds": 10.0, "train_seconds": 99.0, "device": "Some CPU, 2 threads", "notes": ["three images are inexact"],
    "commit": "abc", "date": "2026-01-02",
}  # fmt: skip
VICTIM = {k: v for k, v in CELL.items() if k not in ("after", "clean_images", "seconds")} | {"defence": "none"}


@pytest.fixture(scope="module")
def published():
    return json.loads((RESULTS / "published.json").read_text())


def test_a_setting_is_one_row_with_the_mean_over_its_seeds(published):
    other = CELL | {"seed": 1, "after": {"acc": 0.60, "asr": 0.1}, "seconds": 20.0}
    lines = recordext.table([CELL, other], published, "ft")
    ours = [line for line in lines if "small" in line]
    wanted = "| BadNets | small (2 seeds) | 500 | 80.0 → 65.0 | 100.0 → 30.0 | 15 |"
    assert [line.replace("\u00a0", " ") for line in ours] == [wanted]


def test_published_rows_of_the_same_data_attack_and_method_stand_below(published):
    lines = recordext.table([CELL, CELL | {"seed": 1}], published, "ft")
    quoted = [line for line in lines if "cite:p" in line]
    wanted = [
        p for p in published if p["id"] in ("leaderboard-cifar10-10-badnets-ft", "ftsam-cifar10-10-badnets-a2o-ft")
    ]
    assert len(quoted) == len(wanted) == 2
    for line, p in zip(quoted, wanted, strict=True):
        assert f"| →\u00a0{p['acc']} |" in line and f"| →\u00a0{p['asr']} |" in line and p["cite"] in line
        assert "| 2,500 |" in line and p["clean_budget"] == "5 % of the training set (2,500 images)"
    assert len({line.count("|") for line in lines}) == 1
    assert not recordext.published_rows(CELL | {"dataset": "signs"}, published)
    assert not recordext.published_rows(CELL | {"defence": "mnp"}, published)


def test_victims_show_no_repair(published):
    line = recordext.table([VICTIM, VICTIM | {"attack": "none", "before": {"acc": 0.9}}], published, "")
    assert "| BadNets | small | 80.0 | 100.0 | 99 |" in line
    assert "| clean training | small | 90.0 |  | 99 |" in line
    assert "| network, on CIFAR-10 |" in line[0]
    both = recordext.table([VICTIM, VICTIM | {"dataset": "signs"}], published, "")
    assert "| data, network |" in both[0] and any("| signs, small |" in text for text in both)
    assert len({text.count("|") for text in line}) == 1  # published rows have as many columns


def test_attacks_stand_in_their_order_and_published_rows_below_the_usual_setting(published):
    rows = [VICTIM | {"attack": a} for a in ("blend", "badnets:official", "badnets")]
    titles = [line.split(" | ")[0][2:] for line in recordext.table(rows, published, "")[2:]]
    assert titles == ["BadNets"] * 3 + ["BadNets, official"] + ["Blend"] * 3


def test_records_of_a_gpu_come_first_and_are_known_by_the_device(tmp_path):
    gpu = CELL | {"device": "NVIDIA H200"}
    (tmp_path / "a.jsonl").write_text(json.dumps(CELL) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(gpu) + "\n")
    assert recordext.full_records(tmp_path) == [gpu, CELL]


def test_remarks_name_machine_seeds_and_what_is_wrong_with_the_data():
    text = recordext.remarks([CELL, CELL | {"seed": 4}])
    assert "Some CPU, 2 threads; seed 0, 4; commit `abc`; 2026-01-02" in text and "three images are inexact" in text


def test_committed_records_carry_what_the_tables_need(published):
    rows = recordext.full_records(RESULTS / "full")
    assert rows
    for r in rows:
        assert {"device", "torch", "seed", "commit", "date", "peak_mb", "train_seconds", "notes"} <= set(r)
        assert r["defence"] == "none" or {"after", "clean_images", "seconds", "cpu_seconds"} <= set(r)
    for defence in {r["defence"] for r in rows} - {"none"}:
        kind = defence.partition(":")[0]
        assert recordext.table([r for r in rows if r["defence"] == defence], published, kind)[2:]
