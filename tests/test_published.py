"""The numbers that pages quote: published ones have a source, and the book's own tables say what `bdlib` says."""

import json
import re
from typing import Any

import pytest
import torch
from conftest import ROOT

from bdlib import data, models
from bdlib.lab import SCALES, Lab
from bdlib.neurons import flat, ones

BOOK = ROOT / "book"
FIELDS = (
    "id", "method", "attack", "dataset", "network", "poison_rate", "clean_budget", "acc", "asr", "ra", "source", "note",
)  # fmt: skip
TEXT = ("id", "method", "attack", "dataset", "network", "source", "note")
PER_CENT = ("poison_rate", "acc", "asr", "ra", "acc_drop", "asr_drop", "der", "pruned_percent")
OPTIONAL = {
    "cite": str, "der": float, "acc_drop": float, "asr_drop": float, "pruned_percent": float, "threshold": float,
    "eps": float, "alpha": float, "inner_steps": int, "seconds": float, "epoch": int,
}  # fmt: skip
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def records() -> Records:
    return json.loads((BOOK / "results" / "published.json").read_text())


@pytest.fixture(scope="module")
def bib() -> set[str]:
    return set(re.findall(r"^@\w+\{([^,\s]+),", (BOOK / "references.bib").read_text(), re.MULTILINE))


def test_every_record_has_the_fields(records: Records) -> None:
    for r in records:
        assert set(FIELDS) <= set(r) <= {*FIELDS, *OPTIONAL}, r["id"]
        for name in TEXT:
            assert isinstance(r[name], str) and r[name].strip() == r[name] != "", (r["id"], name)
        assert r["clean_budget"] is None or isinstance(r["clean_budget"], str), r["id"]
        for name, kind in OPTIONAL.items():
            value = r.get(name)
            assert value is None or isinstance(value, (int, float) if kind is float else kind), (r["id"], name)


def test_ids_are_unique_and_speak(records: Records) -> None:
    ids = [r["id"] for r in records]
    assert len(set(ids)) == len(ids)
    assert [i for i in ids if not re.fullmatch(r"[a-z0-9.-]+", i)] == []


def test_numbers_are_per_cent_or_absent(records: Records) -> None:
    for r in records:
        for name in PER_CENT:
            value = r.get(name)
            assert value is None or (isinstance(value, int | float) and 0 <= value <= 100), (r["id"], name, value)
        if r["asr"] is not None and r["ra"] is not None:  # all-to-one: an image is read in one way only
            assert r["asr"] + r["ra"] <= 100.01 or "a slip of the source" in r["note"], r["id"]
        for name in ("threshold", "alpha"):
            assert r.get(name) is None or 0 <= r[name] <= 1, (r["id"], name)


def test_shares_were_not_written_for_per_cent(records: Records) -> None:
    # 0.93 for 93 % would pass the range: no classifier of these tables is below 10 %
    assert [r["id"] for r in records if r["acc"] is not None and r["acc"] < 10] == []


def test_a_record_says_something(records: Records) -> None:
    for r in records:
        assert any(r.get(name) is not None for name in ("acc", "asr", "ra", "acc_drop", "asr_drop")), r["id"]


def test_a_defence_has_a_budget_and_its_absence_none(records: Records) -> None:
    for r in records:
        assert (r["method"] == "none") == (r["clean_budget"] is None), r["id"]


def test_sources_can_be_followed(records: Records, bib: set[str]) -> None:
    for r in records:
        assert len(r["source"]) > 15, r["id"]
        assert r["cite"] in bib, (r["id"], r["cite"])


def test_caveats_stand_beside_the_numbers(records: Records) -> None:
    for r in records:
        if r["id"].startswith("leaderboard-") and r["method"] == "ANP":
            assert "threshold picked with the ASR on the test set" in r["note"], r["id"]
        if r["id"].startswith("anp-figure-"):
            assert "by eye" in r["note"], r["id"]
        if r["id"].startswith(("nad-readme-", "nad-log-")):
            assert "9,000" in r["note"], r["id"]


def test_what_the_chapters_quote_is_there(records: Records) -> None:
    ids = {r["id"] for r in records}
    for dataset in ("cifar10", "gtsrb"):
        for attack in ("badnets", "blended"):
            for method in ("none", "ft", "fp", "nad", "anp"):
                assert f"leaderboard-{dataset}-10-{attack}-{method}" in ids
    assert {
        "anp-paper-headline",
        "anp-figure-badnets-threshold-0.2",
        "eecs-badnets-none",
        "nad-readme-badnets-nad",
    } <= ids


def test_der_of_a_table_follows_from_its_acc_and_asr(records: Records) -> None:
    by_id = {r["id"]: r for r in records}
    rated = [r for r in records if r.get("der") is not None]
    assert rated
    for r in rated:
        before = by_id[f"{r['id'].rpartition('-')[0].removesuffix('-ft')}-none"]
        gain, cost = max(0, before["asr"] - r["asr"]), max(0, before["acc"] - r["acc"])
        assert r["der"] == pytest.approx((gain - cost + 100) / 2, abs=0.02), r["id"]


def test_every_citation_is_in_the_bibliography(bib: set[str]) -> None:
    pages = [*BOOK.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    cited = {
        key.strip()
        for page in pages
        for keys in re.findall(r"\{cite(?::[a-z]+)?\}`([^`]+)`", page.read_text())
        for key in keys.split(",")
    }
    assert cited and cited <= bib, cited - bib


# the tables of the page "Data and networks"


def rows(first_column: str) -> dict[str, list[str]]:
    """Rows of the page's table with this head: text of the first cell -> the other cells."""
    lines = (BOOK / "data-and-networks.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first_column)) + 2
    found: dict[str, list[str]] = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = cells
    return found


def test_table_of_image_sets() -> None:
    from bdlib.data import digits, signs
    from bdlib.data.sources import SOURCES

    official = {name: (s.sizes, len(s.classes), s.shape, s.augment) for name, s in SOURCES.items()}
    status = {s["name"]: s for s in data.status()}
    for name, module in (("signs", signs), ("digits", digits)):
        s = status[name]
        official[name] = ((s["train"], s["test"]), s["classes"], s["shape"], module.AUGMENT)
    table = rows("| name | training |")
    assert set(table) == set(data.names())
    for name, (train, test, classes, image, augmentation) in table.items():
        sizes, k, shape, augment = official[name]
        assert (train, test, classes) == (f"{sizes[0]:,}", f"{sizes[1]:,}", str(k)), name
        assert image == " × ".join(map(str, shape)), name
        assert augmentation == f"crop {augment.pad}" + (", flip" if augment.flip else ""), name
        assert augment.cutout == 0, name


def test_table_of_networks() -> None:
    table = rows("| name | network |")
    assert set(table) == {"small", "resnet18", "preact_resnet18", "wide_resnet", "vgg19_bn"}
    for name, (_, parameters, layers, neurons) in table.items():
        with torch.device("meta"):  # counted, never computed with
            net = getattr(models, name)(12 if name == "small" else 10, (0.5,) * 3, (0.25,) * 3)
        masks = ones(net)
        assert parameters == f"{sum(p.numel() for p in net.parameters()):,}", name
        assert (layers, neurons) == (str(len(masks)), f"{len(flat(masks)):,}"), name


def test_table_of_scales() -> None:
    from bdlib.data.signs import CLASSES
    from bdlib.data.sources import CIFAR_CLASSES

    table = rows("| | `small` |")
    trained = {"small": data.status()[0]["train"], "full": 50000}
    classes = {"small": CLASSES, "full": CIFAR_CLASSES}
    for column, name in enumerate(("small", "full")):
        scale = SCALES[name]
        assert Lab(name, device="cpu").scale == scale
        said = {head: cells[column].strip("`") for head, cells in table.items()}
        assert said["images"] == scale.dataset
        assert said["network"] == scale.network
        assert said["victim trained on"] == f"{trained[name] - scale.reserve:,}"
        assert said["kept for the defender to draw from"] == f"{scale.reserve:,}"
        assert said["clean images of the defender"] == str(scale.clean)
        assert said["target"] == classes[name][Lab(name, device="cpu").target]
        r = scale.recipe
        assert said["epochs, batch, peak learning rate"] == f"{r.epochs}, {r.batch}, {r.lr:g}"
