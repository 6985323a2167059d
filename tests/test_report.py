"""The report of a matrix: its rows, tables, figures, export, and the published values beside. All numbers invented."""

import builtins
import io
import json
import math
from itertools import pairwise

import pytest

from bdlib import report
from bdlib.published import beside, compare

RUN = {"device": "an invented machine", "dtype": "float32", "torch": "0.0", "python": "3", "commit": "c0ffee"}
PUBLISHED = {"id": "x", "method": "ANP", "attack": "BadNets", "dataset": "CIFAR-10", "network": "PreAct-ResNet-18",
             "poison_rate": 10, "clean_budget": "5 % of the training set (2,500 images)", "acc": 84.0, "asr": 1.0,
             "ra": None, "source": "an invented page", "note": "an invented note"}  # fmt: skip


def record(attack="badnets", defence="none", *, asr=0.96, acc=0.9, seed=0, rate=0.1, clean="5%", **more):
    """A record as `bdlib.cells.run` returns it; `acc` and `asr` are those of the repaired network."""
    out = {"key": "k", "dataset": "cifar10", "network": "preact_resnet18", "attack": attack, "rate": rate}
    out |= {"defence": defence, "clean": clean if defence != "none" else "", "seed": seed, "epochs": None}
    out |= {"batch": None, "lr": None, "curves": False, "settings": [f"X(target=0, rate={rate})", "Y()"]}
    out |= {"poisoned": 4500, "train_seconds": 30.0, "before": {"acc": 0.92, "asr": 0.96, "ra": 0.03}}
    if attack == "none":
        out |= {"rate": None, "before": {"acc": 0.92}, "settings": ["None", "Y()"]}
    if defence != "none":
        out |= {"seconds": 4.0, "cpu_seconds": 4.0, "clean_images": 2500, "after": {"acc": acc, "asr": asr, "ra": 0.8}}
        out |= {"der": 0.5 + (0.96 - asr) / 2}
        if attack == "none":
            out |= {"after": {"acc": acc}}
            del out["der"]
    return {**out, "peak_mb": 900.0, "notes": [], **RUN, "date": "2000-01-01", **more}


def failed(**more):
    """What `bdlib.cells.safely` returns for a cell that raised."""
    kept = ("dataset", "network", "attack", "rate", "defence", "clean", "seed", "epochs", "batch", "lr", "curves")
    whole = record(**more)
    return {k: whole[k] for k in kept} | {"error": "ValueError: two\nlines", "traceback": "File x"}


MANY = [record("none"), record("none", "anp", acc=0.91), record(), record(defence="anp", asr=0.02, acc=0.86),
        record(defence="ft", asr=0.7), record("blend"), failed(attack="blend", defence="anp"),
        record("blend", "ft", asr=0.5, seconds=6.0)]  # fmt: skip


def cells_of(text, start):
    """The cells of the table row that begins with `start`."""
    (found,) = [x for x in text.splitlines() if x.startswith(f"| {start} |")]
    return [c.strip() for c in found.strip("|").split("|")]


def test_rows_stand_under_their_heads():
    head, row = report.header(), report.line(record(defence="anp", asr=0.02, acc=0.86))
    for name, value in {"attack": "badnets", "rate": "10%", "clean": "5%", "ACC": "92.0 -> 86.0", "ASR": "96.0 -> 2.0",
                        "RA": "3.0 -> 80.0", "DER": "0.970"}.items():  # fmt: skip
        assert row[head.index(name) :].startswith(f"{value} "), name
    assert row.endswith(" 4.0") and report.line(record()).endswith(" 30.0")  # of the repair, else of training
    long = report.line(record("trojan-patch:official"))
    assert "trojan-patc…  10%" in long and long.index("10%") == row.index("10%")


def test_a_victim_and_a_clean_network_have_no_second_score_and_no_asr():
    assert " -> " not in report.line(record()) and "96.0" in report.line(record())
    assert "92.0 -> 91.0" in report.line(record("none", "anp", acc=0.91)) and "96.0" not in report.line(record("none"))


def test_a_failed_row_says_so_in_one_line():
    row = report.line(failed(defence="anp"))
    assert row.endswith("ERROR ValueError: two lines") and row.startswith("cifar10")


@pytest.mark.parametrize(
    ("given", "text"),
    [({"rate": 0.005}, "0.5%"), ({"rate": None, "settings": ["CL(target=0, class_rate=0.8)", "None"]}, "80%/class"),
     ({"rate": None, "settings": ["A(cover_rate=0.2, rate=0.1)", "None"]}, "10%"),
     ({"rate": None, "settings": ["None", "None"]}, "")],
)  # fmt: skip
def test_the_rate_is_the_attacks_own_where_the_cell_names_none(given, text):
    assert report.rate({**record(), **given}) == text


def test_markdown_says_what_ran_and_what_failed():
    text = report.markdown([*MANY, record(seed=0, notes=["one image is missing"], epochs=3, clean="500")])
    for words in ("an invented machine", "torch: 0.0", "c0ffee", "2000-01-01", "cifar10: one image is missing",
                  "9 cells, 1 failed", "recipe: epochs 3",
                  "- cifar10/preact_resnet18/blend/0.1/anp/5%/0: ValueError: two lines"):  # fmt: skip
        assert words in text
    assert "Failed" not in report.markdown([record()])


def test_markdown_puts_attacks_in_rows_and_the_victim_first():
    text = report.markdown(MANY).split("DER")
    assert cells_of(text[0], "attack") == ["attack", "none", "anp", "ft"]
    assert cells_of(text[0], "badnets 10%") == ["badnets 10%", "92.0 / 96.0", "86.0 / 2.0", "90.0 / 70.0"]
    assert cells_of(text[0], "blend 10%") == ["blend 10%", "92.0 / 96.0", "(1 failed)", "90.0 / 50.0"]
    assert cells_of(text[0], "none") == ["none", "92.0", "91.0", ""]
    assert cells_of(text[1], "badnets 10%") == ["badnets 10%", "0.970", "0.630"]
    assert cells_of(text[1], "ft") == ["ft", "5.0"]  # the median of 4 and 6 seconds


def test_markdown_gives_the_spread_over_seeds_and_counts_the_failed_ones():
    some = [record(defence="anp", asr=a, acc=0.9, seed=s) for s, a in enumerate((0.1, 0.3))]
    text = report.markdown([*some, failed(defence="anp", seed=2)])
    spread = 100 * math.sqrt(2) * 0.1
    assert cells_of(text.split("DER")[0], "badnets 10%")[1] == f"90.0 ± 0.0 / 20.0 ± {spread:.1f} (1 failed)"
    assert "seeds 0, 1, 2" in text


def test_each_clean_budget_has_its_table_and_every_one_the_victim():
    text = report.markdown([record(), record(defence="anp", clean="500", asr=0.3), record(defence="anp", asr=0.1)])
    first, second = text.split("## ")[1:3]
    assert "clean 500" in first and "clean 5%" in second
    assert cells_of(first.split("DER")[0], "badnets 10%")[1:] == ["92.0 / 96.0", "90.0 / 30.0"]
    assert cells_of(second.split("DER")[0], "badnets 10%")[1:] == ["92.0 / 96.0", "90.0 / 10.0"]


def test_a_failed_cell_without_settings_stays_in_its_attacks_row():
    own = record(rate=None, settings=["X(rate=0.3)", "None"])
    text = report.markdown([own, failed(rate=None, defence="anp")])
    assert cells_of(text, "badnets 30%") == ["badnets 30%", "92.0 / 96.0", "(1 failed)"]


def drawn(figure):
    """Numbers written into a heat map, and how dark each square is, by (row, column)."""
    (ax,) = figure.axes
    text = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in ax.texts}
    return text, ax.images[0].get_array()


def test_heat_maps_hold_the_numbers_and_the_worse_is_darker():
    pytest.importorskip("matplotlib")
    found = report.figures(MANY)
    place = "cifar10-preact-resnet18-clean-5-percent"
    assert set(found) == {f"{k}-{place}" for k in ("acc", "asr", "der")} | {"seconds"}
    acc, acc_shade = drawn(found[f"acc-{place}"])
    asr, asr_shade = drawn(found[f"asr-{place}"])
    der, der_shade = drawn(found[f"der-{place}"])
    assert acc[1, 1] == "86.0" and asr[1, 1] == "2.0" and asr[2, 2] == "50.0" and asr[2, 1] == "×" and asr[0, 0] == ""
    assert acc_shade[1, 0] == 0 and acc_shade[1, 1] == pytest.approx(0.5)  # 6 of 12 points lost
    assert asr_shade[1, 0] > asr_shade[1, 2] > asr_shade[1, 1] and asr_shade[1, 1] == pytest.approx(0.02)
    # neither a row for the clean network nor a column for the victim
    assert der[0, 0] == "0.97" and der_shade.shape == (2, 2) and der_shade[0, 1] > der_shade[0, 0]


def test_figures_fit_the_page_and_can_be_read():
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    names = ("none", "anp", "rnp", "mnp", "npd", "nad", "ft", "ft-sam", "fp", "i-bau", "anp:official")
    whole = [record(a, d, asr=0.1) for a in ("badnets", "trojan-patch", "input-aware") for d in names]
    for title, figure in report.figures(whole).items():
        figure.savefig(io.BytesIO(), dpi=figure.dpi)  # lays it out
        width, drawn_box = figure.get_size_inches()[0], figure.get_tightbbox()  # what is drawn, in inches
        assert width <= 6.5 and drawn_box.x0 > -0.01 and drawn_box.x1 < width + 0.01, title
        assert all(t.get_fontsize() >= 8 for t in figure.findobj(Text) if t.get_text())
        if title != "seconds":
            boxes = [t.get_window_extent() for t in figure.axes[0].texts]
            for left, right in pairwise(boxes):
                assert left.x1 < right.x0 or left.y0 != right.y0, title


def test_write_leaves_a_report_whose_pictures_are_there(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.write(MANY, tmp_path / "new")
    assert all(p.stat().st_size for p in paths) and {p.name for p in paths} >= {"report.md", "report.json"}
    text = (tmp_path / "new" / "report.md").read_text()
    pictures = {p.name for p in paths if p.suffix == ".png"}
    assert len(pictures) == 4 and all(f"({p})" in text for p in pictures)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == MANY


def test_write_without_matplotlib_warns_and_keeps_the_rest(tmp_path, monkeypatch):
    def none(records):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(report, "figures", none)
    with pytest.warns(UserWarning, match=r"no figures: No module named 'matplotlib'.*bdlib\[plots\]"):
        paths = report.write(MANY, tmp_path)
    assert sorted(p.name for p in paths) == ["report.json", "report.md"]


def test_a_run_of_which_all_cells_failed_has_a_report(tmp_path):
    paths = report.write([failed(), failed(defence="anp")], tmp_path)
    assert sorted(p.name for p in paths) == ["report.json", "report.md"]
    assert "2 cells, 2 failed" in (tmp_path / "report.md").read_text()


def test_the_tables_need_no_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **more):
        if name.split(".")[0] in ("matplotlib", "PIL"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert report.markdown(MANY) and report.line(MANY[0])


def test_export_is_one_record_a_line_without_failures(tmp_path):
    oracle = [{"threshold": 0.0, "pruned": 0, "acc": 0.9, "asr": 0.0, "ra": 0.1}]
    path = tmp_path / "new" / "x.jsonl"
    given = [record(defence="anp", asr=0.0, oracle=oracle, threshold=0.0, pruned=0, epochs=3), *MANY]
    assert report.export(given, path) == 1
    back = [json.loads(text) for text in path.read_text().splitlines()]
    assert [report.name(r) for r in back] == [report.name(r) for r in given if "error" not in r]
    assert back[0]["oracle"] == oracle and back[0]["epochs"] == 3 and "traceback" not in path.read_text()
    assert back[0]["threshold"] == 0.0 and back[0]["pruned"] == 0 and back[0]["after"]["asr"] == 0.0  # nought is kept
    for r in back:
        assert {"device", "torch", "seed", "commit", "date", "peak_mb", "notes", "before", "clean"} <= set(r)
        assert "batch" not in r and "curves" not in r
    assert report.markdown(back) == report.markdown([r for r in given if "error" not in r])


def compared(ours, *published):
    (row,) = compare([ours], published)
    return row["published"]


def test_compare_finds_rows_of_the_same_data_attack_and_method():
    ours = record(defence="anp", asr=0.02, acc=0.86)
    row = compare([ours], [PUBLISHED])[0]
    assert (row["acc"], row["asr"], row["ra"]) == (86.0, 2.0, 80.0) and row["cell"] == report.name(ours)
    assert [p["differs"] for p in row["published"]] == [[]]
    for other in ({"dataset": "GTSRB"}, {"attack": "WaNet"}, {"attack": "BadNets-A2A"}, {"method": "NAD"}):
        assert compared(ours, PUBLISHED | other) == []
    assert compared(record(), PUBLISHED | {"method": "none", "clean_budget": None})[0]["differs"] == []
    assert (
        len(compared(record("cl", "i-bau"), *(PUBLISHED | {"attack": a, "method": "i-BAU"} for a in ("CLB", "LC"))))
        == 2
    )
    assert len(compared(record(defence="ft-sam:official"), PUBLISHED | {"method": "FT-SAM"})) == 1
    assert compared(record("none"), PUBLISHED | {"method": "none"}) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "differs"),
    [
        ({}, {"network": "ResNet-18"}, ["network ResNet-18 (here PreAct-ResNet-18)"]),
        ({"network": "small"}, {}, ["network PreAct-ResNet-18 (here small)"]),
        ({"rate": 0.01}, {}, ["poisoned 10% (here 1%)"]),
        ({}, {"poison_rate": None}, ["poisoned not said (here 10%)"]),
        ({}, {"poison_rate": None, "note": "poisoned: 80 % of a class"}, ["poisoned see the note (here 10%)"]),
        ({}, {"clean_budget": "500 images"}, ["clean images 500 (here 2500)"]),
        ({}, {"clean_budget": "5 % of the training set"}, []),
        ({}, {"clean_budget": "1 % of the training set"}, ["clean images 1 % of the training set (here 2500)"]),
        ({}, {"clean_budget": None}, ["clean images not said (here 2500)"]),
    ],
)
def test_compare_says_how_circumstances_differ(ours, theirs, differs):
    ours = {**record(defence="anp"), **ours}
    assert compared(ours, PUBLISHED | theirs)[0]["differs"] == differs


def test_the_text_of_a_comparison_names_each_source_once_and_the_cells_without_one():
    rows = [PUBLISHED, PUBLISHED | {"acc": None, "threshold": 0.25, "poison_rate": 5}]
    text = beside(compare([record(defence="anp", acc=0.86), record(defence="mnp"), failed(defence="ft")], rows))
    assert text.count("[1] an invented page: an invented note") == 1 and "[2]" not in text
    assert "84.0   1.0    -        BadNets, ANP [1] same network, poison rate and clean budget" in text
    assert "-      1.0    -        BadNets, ANP [1] threshold 0.25; poisoned 5% (here 10%)" in text
    assert text.endswith("no published value: cifar10/preact_resnet18/badnets/0.1/mnp/5%/0")
    assert "86.0   96.0   80.0   cifar10/preact_resnet18/badnets/0.1/anp/5%/0" in text and "/ft/" not in text


def test_every_name_of_the_comparison_is_in_the_published_file():
    from bdlib import names, published
    from bdlib.records import RESULTS

    rows = json.loads((RESULTS.parent / "published.json").read_text())
    ours = {"dataset": published.DATASETS.values(), "network": published.NETWORKS.values()}
    ours |= {"method": published.METHODS.values(), "attack": sum(published.ATTACKS.values(), ())}
    for key, mapped in ours.items():
        assert set(mapped) <= {r[key] for r in rows}
    assert {r["method"] for r in rows} <= set(published.METHODS.values())
    assert set(published.ATTACKS) <= set(names.ATTACKS) and set(published.METHODS) <= {*names.DEFENCES, "none"}


def test_the_published_file_can_be_printed():
    from bdlib import published
    from bdlib.records import RESULTS

    rows = json.loads((RESULTS.parent / "published.json").read_text())
    ours = [record(a, m) for a in published.ATTACKS for m in published.METHODS]
    ours += [o | {"dataset": "gtsrb"} for o in ours]
    found = compare(ours, rows)
    matched = {p["id"] for row in found for p in row["published"]}
    left = {r["attack"] for r in rows if r["id"] not in matched and r["dataset"] != "CIFAR-100"}
    assert left == {"BadNets-A2A", "mean of six attacks"}  # what no cell of the matrix does
    text = beside(found)
    assert all(r["source"] in text for r in rows if r["id"] in matched)
