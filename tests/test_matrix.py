"""The matrix: which cells, in plain words; each with one record that survives whatever happens to the others."""

import json
import re
import tomllib
import warnings
from dataclasses import asdict, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from bdlib import attacks, cells, data, defenses, names, neurons, provenance
from bdlib.lab import Lab
from bdlib.matrix import ALL_ATTACKS, ALL_DEFENCES, PRESETS, Cell, Matrix

TINY = Matrix(("digits",), ("small",), ("badnets", "blend"), defences=("none", "ft"), clean=("2/class",), epochs=1)
SIGNS, CIFAR = (Lab("small", dataset=name, device="cpu") for name in ("signs", "cifar10"))


# which cells


def test_cells_are_the_product_with_each_victim_before_its_repairs():
    matrix = Matrix(("digits", "signs"), ("small",), ("none", "badnets"), (0.1, 0.2), ("ft", "none", "anp"),
                    ("50", "5%"), (3, 4), curves=True)  # fmt: skip
    found = matrix.cells()
    # clean training has no rate: 2 sets x 2 seeds x (1 + 2 rates), each with its victim and 2 defences x 2 budgets
    assert len(found) == len(set(found)) == 2 * 2 * 3 * (1 + 2 * 2)
    for at, cell in enumerate(found):
        assert cell.victim in found[: at + 1] and (cell.defence == "none") == (cell == cell.victim)
        own = [n for n, other in enumerate(found) if other.victim == cell.victim]
        assert own == list(range(own[0], own[0] + 5))  # together, so that a victim is trained once and stays in reach
        assert (cell.clean == "" and not cell.curves) if cell == cell.victim else (cell.clean and cell.curves)
    assert {c.rate for c in found if c.attack == "badnets"} == {0.1, 0.2} and {c.seed for c in found} == {3, 4}
    assert {c.rate for c in found if c.attack == "none"} == {None}


def test_cells_without_duplicates_without_victims_and_with_a_recipe():
    twice = Matrix(("digits",), ("small",), ("badnets",) * 2, (0.1, 0.1), ("ft", "ft"), seeds=(0, 0), batch=64, lr=0.2)
    [cell] = twice.cells()  # "none" was not asked for
    assert (cell.defence, cell.epochs, cell.batch, cell.lr, cell.clean) == ("ft", None, 64, 0.2, "500")
    assert str(cell) == "digits/small/badnets/0.1/ft/500/0" and str(cell.victim) == "digits/small/badnets/0.1/none/0"


def test_a_rate_is_for_attacks_that_count_all_images_only():
    matrix = Matrix(("cifar10",), attacks=ALL_ATTACKS, rates=(0.01, 0.05), defences=("none",))
    rates = {name: [c.rate for c in matrix.cells() if c.attack == name] for name in ALL_ATTACKS}
    for name in ("cl", "sig", "refool"):  # clean labels: shares of the target class
        assert rates[name] == [None] and not names.counts_all(name)
    for name in ("badnets", "blend", "wanet", "input-aware"):
        assert rates[name] == [0.01, 0.05] and names.counts_all(name)
    assert not names.counts_all("none")
    assert [c.rate for c in replace(matrix, attacks=("sig:official", "wanet:official")).cells()] == [None, 0.01, 0.05]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_what_there_is(preset):
    for cell in PRESETS[preset].cells():
        whole = {"cifar10": 50_000, "gtsrb": 26_640, "digits": 1437}[cell.dataset]
        if cell.defence != "none":
            assert names.defence(cell.defence, cell.network) is not None
            want = names.budget(cell.clean, whole)
            classes = 43 if cell.dataset == "gtsrb" else 10
            assert want.get("count", want.get("per_class", 0) * classes) <= cells.RESERVE.get(cell.dataset, 5000)


def test_presets_are_as_large_as_they_say():
    paper = PRESETS["paper"]
    assert (paper.datasets, paper.networks, paper.rates, paper.clean) == (
        ("cifar10",), ("preact_resnet18",), (0.1,), ("5%",))  # fmt: skip
    assert set(names.ATTACKS) <= set(paper.attacks) and set(paper.defences) == {"none", *names.DEFENCES}
    assert len(set(paper.attacks) - {"none"}) >= 12 and len(set(paper.defences) - {"none"}) >= 8
    assert len(PRESETS["chapter"].attacks) == 1 and set(PRESETS["chapter"].defences) == set(ALL_DEFENCES)
    assert PRESETS["gtsrb"].datasets == ("gtsrb",) and len(PRESETS["low-data"].clean) >= 3
    assert {c.network for p in ("smoke", "cpu") for c in PRESETS[p].cells()} == {"small"}  # no GPU, no hours
    on_cpu = {c.attack.partition(":")[0] for p in ("cpu", "cpu-attacks") for c in PRESETS[p].cells()}
    assert on_cpu == {"none", *ALL_ATTACKS}
    assert PRESETS["smoke"].datasets == ("digits",) and len(PRESETS["smoke"].cells()) <= 8  # nothing to download


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("datasets", ("imagenet",), "datasets must be of signs, digits.*got 'imagenet'"),
        ("networks", ("alexnet",), "networks must be of small.*got 'alexnet'"),
        ("attacks", ("badnet",), "attack must be one of badnets, blend.*got 'badnet'"),
        ("attacks", ("sig:larger",), "preset of sig must be one of paper, official.*got 'larger'"),
        ("defences", ("ap",), "defence must be one of anp, rnp.*got 'ap'"),
        ("defences", ("anp:larger",), "preset of anp must be one of paper, official, small, got 'larger'"),
        ("clean", ("many",), "clean must be a number of images.*got 'many'"),
        ("rates", (0.1, 1.5), r"rates must be in \[0, 1\], got 1.5"),
        ("epochs", -1, "epochs must be 0 or more, got -1"),
        ("batch", 0, "batch must be 1 or more, got 0"),
        ("lr", -0.1, "lr must be 0 or more, got -0.1"),
        *((name, (), f"{name} is empty") for name in ("datasets", "networks", "attacks", "defences", "clean", "seeds")),
    ],
)
def test_a_matrix_refuses_what_it_does_not_know_and_lists_what_it_does(field, value, words):
    with pytest.raises(ValueError, match=words):
        replace(TINY, **{field: value})


# names


@pytest.fixture
def no_data(monkeypatch):
    """Loading a data set fails the test."""
    monkeypatch.setattr(data, "load", lambda *args, **more: pytest.fail("data were loaded"))


@pytest.mark.parametrize("lab", [SIGNS, CIFAR], ids=["signs", "cifar10"])
@pytest.mark.parametrize("name", names.ATTACKS)
def test_every_attack_and_preset_is_aimed_at_the_target_and_rated(name, lab, no_data):
    kind = getattr(attacks, names.ATTACKS[name])
    known = attacks.presets(kind)
    usual = known.get("small", kind) if lab is SIGNS else known["paper"]
    assert names.attack(name, lab) == usual(lab.target)
    for preset in ("", *known):
        said = f"{name}:{preset}" if preset else name
        made, rated = names.attack(said, lab), names.attack(said, lab, rate=0.03)
        assert type(made) is kind and made.target == lab.target
        assert made == (known[preset](lab.target) if preset else usual(lab.target))
        assert rated == (replace(made, rate=0.03) if names.counts_all(said) else made)
        assert (getattr(made, "rate", None) is not None) == names.counts_all(said)  # never both ways of counting


@pytest.mark.parametrize("network", ["small", "preact_resnet18"])
@pytest.mark.parametrize("name", names.DEFENCES)
def test_every_defence_and_preset(name, network):
    kind = getattr(defenses, names.DEFENCES[name])
    assert names.defence(name, network) == (kind.small() if network == "small" else kind.paper())
    for preset in names.PRESETS:
        assert names.defence(f"{name}:{preset}", network) == getattr(kind, preset)()


def test_none_is_no_attack_and_no_defence():
    assert names.attack("none", SIGNS) is None and names.defence("none", "small") is None


COUNTS = st.integers(1, 50_000)


@given(COUNTS, COUNTS)
def test_budgets_in_numbers_and_shares(count, images):
    assert names.budget(str(count), images) == {"count": count}
    assert names.budget(f"{count}/class", images) == {"per_class": count}
    assert names.budget("100%", images) == {"count": images}
    share = min(1.0, count / images)
    if round(images * share) >= 1:
        assert abs(names.budget(f"{100 * share:.9f}%", images)["count"] - images * share) <= 0.51


@given(
    st.one_of(st.text(max_size=12), st.from_regex(r"-?(inf|nan|[0-9]{0,3}\.?[0-9]{0,2})(%|/class)*", fullmatch=True))
)
def test_a_budget_is_understood_or_refused_by_name(text):
    try:
        [(how, number)] = names.budget(text, 1000).items()
    except ValueError as error:
        assert "clean must be" in str(error) and repr(text) in str(error)
        return
    assert number >= 1 and how == ("per_class" if text.endswith("/class") else "count")
    assert re.fullmatch(r"\s*\+?[\d_]+\s*(/class)?|.*%", text) and text.count("%") + text.count("/class") <= 1
    assert not text.endswith("%") or number <= 1000


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "5.5", "0%", "101%", "-1%", "nan%", "inf%", "5%/class", "0/class", "%"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape(f"clean must be a number of images (\"500\"), a share (\"5%\") or "
                                                   f"\"10/class\", got {text!r}")):  # fmt: skip
        names.budget(text, 1000)


# TOML


def toml(matrix):
    lines = [f"{f.name} = {json.dumps(getattr(matrix, f.name))}" for f in fields(matrix)]
    return "\n".join(line for line in lines if not line.endswith("null"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_matrix_comes_back_from_toml(tmp_path, preset):
    path = tmp_path / "m.toml"
    path.write_text(toml(PRESETS[preset]))
    assert tomllib.loads(path.read_text()) and Matrix.read(path) == PRESETS[preset]


def test_whole_numbers_in_toml_are_the_same_cells(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text("rates = [1]\nclean = [500]\ndefences = ['ft']\nlr = 1\n")
    [cell] = Matrix.read(path).cells()
    assert repr(cell.rate) == "1.0" and cell.clean == "500" and cell.attack == "badnets"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# attacks\n\natacks = ['sig']", "line 3: unknown key 'atacks'; known are datasets, networks, attacks"),
        ("attacks = [\n  'sig',\n 'x', ]\n'x' = 1", "line 4: unknown key 'x'"),
        ("seeds = [1]\n[ extra ]\nx = 1", "line 2: unknown key 'extra'"),
        ("seeds = [1]\nattacks = 'sig'", "line 2: attacks must be a list, got 'sig'"),
        ("attacks = [1]", "line 1: attacks cannot hold 1"),
        ("seeds = ['0']", "line 1: seeds cannot hold '0'"),
        ("seeds = [true]", "line 1: seeds cannot hold True"),
        ("rates = ['0.1']", "line 1: rates cannot hold '0.1'"),
        ("\nepochs = 1.5", "line 2: epochs cannot hold 1.5"),
        ("epochs = [1]", r"line 1: epochs cannot hold \[1\]"),
        ("curves = 1", "line 1: curves cannot hold 1"),
        ("clean = [0.5]", "line 1: clean cannot hold 0.5"),
        ("attacks = ['sigg']", "attack must be one of badnets.*got 'sigg'"),
        ("attacks = [,]", "is not TOML: .*at line 1"),
        ("seeds = [1]\nseeds = [2]\nlr = 1", "is not TOML: .*at line 2"),
    ],
)
def test_toml_that_is_wrong_names_file_line_and_value(tmp_path, text, words):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{words}"):
        Matrix.read(path)


# records


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of its own for each test."""
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("BDLIB_DEVICE", raising=False)
    return tmp_path / "store"


@pytest.fixture
def runs(monkeypatch):
    """Cells that cost nothing; the list of those computed."""
    done = []

    def run(cell, **more):
        done.append(cell)
        return {"attack": cell.attack, "n": len(done)}

    monkeypatch.setattr(cells, "run", run)
    return done


def test_what_is_there_is_never_computed_again(runs, store):
    todo, shown = TINY.cells(), []
    assert [r for *_, r in cells.status(todo)] == [None] * 4
    records = cells.make(todo)
    assert runs == todo and [r["n"] for r in records] == [1, 2, 3, 4]
    assert cells.make(todo[::-1], show=lambda c, r: shown.append(c)) == records[::-1] and runs == todo
    assert set(shown) == set(todo)
    more = replace(TINY, seeds=(0, 1)).cells()  # another matrix finds what the first one has computed
    assert [r["n"] for r in cells.make(more)][:4] == [1, 2, 3, 4] and set(runs[4:]) == {c for c in more if c.seed == 1}
    assert len(list((store / "bench").iterdir())) == 8  # a file each, and no other


def test_an_interrupted_run_keeps_what_was_done(runs, monkeypatch):
    todo = TINY.cells()
    good = cells.run

    def third(cell, **more):
        if len(runs) == 2:
            raise KeyboardInterrupt
        return good(cell, **more)

    monkeypatch.setattr(cells, "run", third)
    with pytest.raises(KeyboardInterrupt):
        cells.make(todo)
    assert [r is not None for *_, r in cells.status(todo)] == [True, True, False, False]
    monkeypatch.setattr(cells, "run", good)
    assert [r["n"] for r in cells.make(todo)] == [1, 2, 3, 4] and runs == todo


def test_a_failing_cell_costs_no_other_and_is_tried_again(runs, monkeypatch):
    todo, good = TINY.cells(), cells.run
    monkeypatch.setattr(cells, "run", lambda c, **more: {}["x"] if c == todo[1] else good(c, **more))
    records = cells.make(todo)
    assert ["error" in r for r in records] == [False, True, False, False] and runs == [todo[0], *todo[2:]]
    bad = records[1]
    assert bad["error"] == "KeyError: 'x'" and bad["defence"] == "ft"
    assert '{}["x"]' in bad["traceback"] and next(iter(cells.status(todo[1:])))[2] == bad  # kept, with its place
    monkeypatch.setattr(cells, "run", good)
    again = cells.make(todo)
    assert not any("error" in r for r in again) and runs[3:] == [todo[1]]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-3], lambda raw: raw[:20], lambda raw: b"", lambda raw: b"\xff" * 9]
)
def test_a_truncated_record_is_reported_and_made_anew(runs, store, damage):
    todo = TINY.cells()[:2]
    cells.make(todo)
    path = store / "bench" / f"{next(iter(cells.status(todo)))[1]}.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"the record {re.escape(str(path))} is damaged .*it is made anew"):
        assert [r["n"] for r in cells.make(todo)] == [3, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r["n"] for r in cells.make(todo)] == [3, 2]


@given(st.data())
def test_no_flipped_bit_of_a_record_goes_unseen(tmp_path_factory, at):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setenv("BDLIB_STORE", str(folder))
        cells.save("k", {"acc": 0.9123})
        path = folder / "bench" / "k.json"
        raw = bytearray(path.read_bytes())
        raw[at.draw(st.integers(0, len(raw) - 1))] ^= 1 << at.draw(st.integers(0, 7))
        path.write_bytes(raw)
        with pytest.warns(UserWarning, match="is damaged"):
            assert cells.load("k") is None


def test_a_record_is_written_whole_or_not_at_all(store, monkeypatch):
    cells.save("k", {"acc": 0.5})
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cells.save("k", {"acc": 0.6})
    assert cells.load("k") == {"acc": 0.5} and [p.name for p in (store / "bench").iterdir()] == ["k.json"]


def test_an_engine_gets_what_is_missing_and_may_answer_in_any_order(runs):
    todo, asked = TINY.cells(), []
    cells.make(todo[:1])

    def engine(wanted):
        asked.extend(wanted)
        return ((c, {"by": "engine", "cell": str(c)}) for c in wanted[::-1])

    records = cells.make(todo, engine=engine)
    assert asked == todo[1:] and [r.get("cell") for r in records] == [None, *map(str, todo[1:])] and runs == todo[:1]
    assert [r for *_, r in cells.status(todo)] == records


# keys


def test_a_key_stands_for_every_field_the_data_and_the_code(monkeypatch):
    base = Cell("digits", "small", "badnets", None, "ft", "2/class", 0)
    changes = {
        "dataset": "signs", "attack": "blend", "rate": 0.2, "defence": "fp", "clean": "3/class", "seed": 1, "epochs": 3,
        "batch": 64, "lr": 0.3, "curves": True, "network": "resnet18",
    }  # fmt: skip
    assert changes.keys() == asdict(base).keys()
    others = [replace(base, **{name: value}) for name, value in changes.items()]
    monkeypatch.setattr(cells, "_fingerprints", lambda lab: ("data",))  # signs would be drawn for their hash
    keys = [cells.key_of(c, cells.lab_of(c)) for c in (base, *others)]
    assert len(set(keys)) == len(keys) and keys[0] == cells.key_of(base, cells.lab_of(base))
    lab, asked = cells.lab_of(base), []
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "fingerprint", lambda *modules: asked.extend(modules) or "another version")
        assert cells.key_of(base, lab) != keys[0]
    assert {"bdlib.attacks.badnets", "bdlib.defenses.ft", "bdlib.training", "bdlib.metrics"} <= set(asked)
    assert cells.key_of(base, lab) == keys[0]
    monkeypatch.setattr(cells, "_fingerprints", lambda lab: ("other data",))
    assert cells.key_of(base, lab) != keys[0]


def test_a_method_that_changed_makes_its_own_records_stale_and_no_other(runs, monkeypatch):
    todo, real = TINY.cells(), provenance.fingerprint
    cells.make(todo)

    def edited(*modules):
        return real(*modules) + "edited" * ("bdlib.defenses.ft" in modules)

    monkeypatch.setattr(provenance, "fingerprint", edited)
    assert [r is not None for *_, r in cells.status(todo)] == [True, False, True, False]


# how a cell is computed


class Hungry(torch.nn.Sequential):
    def forward(self, x):
        if len(x) > 200:
            raise torch.cuda.OutOfMemoryError("no room")
        return super().forward(x)


def test_scores_and_curves_need_no_more_memory_than_there_is():
    lab = cells.lab_of(TINY.cells()[0], device="cpu")
    net, trigger = lab.network(), attacks.BadNets(0).trigger(lab.train.shape, len(lab.train.classes))
    with pytest.warns(UserWarning, match="batches of 125"):
        assert cells.scores(Hungry(net), lab.test, trigger) == cells.scores(net, lab.test, trigger)
    masks = neurons.ones(net)
    with pytest.warns(UserWarning, match="batches of 125"):
        (hungry,) = neurons.curve(Hungry(net), {f"0.{n}": m for n, m in masks.items()}, [0.5], lab.test, trigger)
    assert [hungry] == neurons.curve(net, masks, [0.5], lab.test, trigger)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_that_says_what_was_found():
    cell = TINY.cells()[0]
    words = f"device 'cuda:1' was asked for; torch {re.escape(torch.__version__)} .* finds no GPU here"
    for ask in (lambda: cells.lab_of(cell, device="cuda:1"), lambda: cells.make([cell], device="cuda:1")):
        with pytest.raises(ValueError, match=words):
            ask()
    assert cells.lab_of(cell).device == "cpu"


def test_the_device_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("BDLIB_DEVICE", "meta")
    assert cells.lab_of(TINY.cells()[0]).device == "meta"
    assert cells.lab_of(TINY.cells()[0], device="cpu").device == "cpu"


@pytest.mark.parametrize("before", [(False, "highest"), (True, "medium")])
def test_global_flags_are_put_back_even_after_an_error(monkeypatch, before):
    def flags():
        return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    kept = flags()
    try:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])
        with pytest.raises(ZeroDivisionError), cells._quick():
            inside = flags()
            raise ZeroDivisionError
        assert inside == (True, "high") and flags() == before
    finally:
        torch.backends.cudnn.benchmark = kept[0]
        torch.set_float32_matmul_precision(kept[1])


def test_two_real_cells():
    victim, repair = cells.make(replace(TINY, attacks=("badnets",), rates=(0.2,)).cells(), device="cpu")
    assert "error" not in victim and "error" not in repair, (victim.get("error"), repair.get("error"))
    assert victim["poisoned"] == round(0.2 * (1437 - 400)) and victim["before"] == repair["before"]
    assert victim["settings"][1] == "None" and "rate=0.2" in victim["settings"][0] and "FT(" in repair["settings"][1]
    assert repair["clean_images"] == 20 and 0 <= repair["der"] <= 1 and "after" not in victim
    assert {"acc", "asr", "ra"} <= victim["before"].keys() & repair["after"].keys()
    assert min(repair[k] for k in ("seconds", "cpu_seconds", "train_seconds", "peak_mb")) > 0
    assert {"key", "device", "torch", "commit", "date", "notes"} <= victim.keys() & repair.keys()


def test_a_clean_network_has_an_accuracy_and_no_success_rate():
    _, record = cells.make(replace(TINY, attacks=("none",)).cells(), device="cpu")
    assert record["before"].keys() == record["after"].keys() == {"acc"} and "der" not in record
    assert record["poisoned"] == 0 and record["settings"][0] == "None"


@pytest.mark.slow
def test_the_smoke_preset_runs_is_complete_afterwards_and_repeats_nothing(monkeypatch):
    todo = PRESETS["smoke"].cells()
    records = cells.make(todo, device="cpu")
    assert [r.get("error") for r in records] == [None] * len(todo)
    assert [r for *_, r in cells.status(todo, device="cpu")] == records
    monkeypatch.setattr(cells, "run", lambda *args, **more: pytest.fail("computed twice"))
    assert cells.make(todo, device="cpu") == records
    for record in records:
        assert record["before"]["acc"] > 0.5
