"""The command line: tables, JSON, overrides, bad input, interruption."""

import json
import re
import subprocess
import sys
import types

import pytest

from bdlib import __main__ as cli
from bdlib import cells, names

# digits are real, small and need no download; one epoch is enough to run through everything
RUN = ["--dataset", "digits", "--epochs", "1", "--device", "cpu", "--target", "3"]


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.delenv("BDLIB_SCALE", raising=False)
    monkeypatch.delenv("BDLIB_DEVICE", raising=False)


def run(capsys, *args: str) -> tuple[int, str, str]:
    status = cli.main(args)
    out, err = capsys.readouterr()
    return status, out, err


def test_train_prints_a_table_and_finds_the_victim_again(capsys, tmp_path):
    status, out, _ = run(capsys, "train", *RUN)
    assert status == 0 and "ACC" in out and "ASR" in out and "digits" in out
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 1
    assert run(capsys, "train", *RUN)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == kept  # not trained again


def test_json_is_the_record(capsys):
    status, out, _ = run(capsys, "train", *RUN, "--attack", "blend", "--rate", "0.2", "--json")
    record = json.loads(out)
    assert status == 0 and record["seed"] == 0 and "rate=0.2" in record["attack"] and "target=3" in record["attack"]
    assert 0 <= record["asr"] <= 1 and record["torch"] and record["commit"] and record["date"]


def test_defend_scores_before_and_after(capsys, tmp_path):
    record_file = tmp_path / "records.jsonl"
    fields = [
        "--set",
        "iterations=2",
        "--set",
        "threshold=0.5",
        "--per-class",
        "4",
        "--record",
        str(record_file),
        "--json",
    ]
    status, out, _ = run(capsys, "defend", *RUN, "--defense", "anp", *fields)
    record = json.loads(out)
    assert status == 0 and record["threshold"] == 0.5 and record["clean_images"] == 40
    assert {"acc", "asr", "ra"} <= set(record["before"]) & set(record["after"]) and 0 <= record["der"] <= 1
    assert run(capsys, "defend", *RUN, "--defence", "ft", "--set", "epochs=1", *fields[4:])[0] == 0
    lines = [json.loads(line) for line in record_file.read_text().splitlines()]
    assert [line["command"] for line in lines] == ["defend", "defend"] and "FT(" in lines[1]["defense"]


def test_evaluate_shows_the_clean_networks_floor(capsys):
    status, out, _ = run(capsys, "evaluate", *RUN)
    assert status == 0 and "clean network:" in out


def test_data_lists_fetches_and_previews(capsys, tmp_path):
    assert "digits" in run(capsys, "data", "list")[1]
    facts = json.loads(run(capsys, "data", "fetch", "digits", "--json")[1])
    assert facts["train"] == 1437 and facts["classes"] == 10
    picture = tmp_path / "preview.png"
    assert run(capsys, "data", "preview", "digits", "-o", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", *RUN, "--rate", "1.5"], r"rate must be in [0, 1] (share of all images), got 1.5"),
        (["train", *RUN[:-1], "10"], "target must be a class in [0, 9], got 10"),
        (["train", "--dataset", "imagenet"], "name must be one of signs"),
        (["train", *RUN, "--network", "alexnet"], "network must be one of small"),
        (["defend", *RUN, "--set", "speed=3"], "no field 'speed'"),
        (["defend", *RUN, "--set", "eps=fast"], "'fast' is neither a number"),
        (["defend", *RUN, "--set", "eps=-1"], "eps must be 0 or more, got -1"),
        (["defend", *RUN, "--clean", "100000"], "count must be in [1, "),
        (["evaluate", *RUN, "--attack", "none"], "no trigger to evaluate"),
        (["train", *RUN, "--attack", "badnet"], "attack must be one of badnets, blend"),
        (["defend", *RUN, "--defense", "amp"], "defence must be one of anp, rnp"),
        (["defend", *RUN, "--defense", "none"], "--defense none repairs nothing; name one of anp"),
        (["data", "fetch"], "needs the name of a set"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(capsys, args, words):
    status, out, err = run(capsys, *args)
    assert status == 2 and out == "" and words in err and err.startswith("error: ") and "Traceback" not in err


def test_ctrl_c_leaves_nothing_broken(capsys, tmp_path, monkeypatch):
    def interrupt(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdlib.lab.fit", interrupt)
    status, out, err = run(capsys, "train", *RUN)
    assert status == 130 and out == "" and "intact" in err
    assert not list(tmp_path.rglob("*"))  # no half file


def test_help_of_every_command(capsys):
    for command in ("train", "evaluate", "defend", "data", "bench"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_every_attack_and_defence_of_the_library_has_a_name():
    from bdlib import attacks, defenses

    assert set(names.ATTACKS.values()) == {kind.__name__ for kind in attacks.KINDS}
    assert set(names.DEFENCES.values()) == set(defenses.__all__) - {"Repair"}


def test_any_preset_of_an_attack_can_be_named(capsys):
    status, out, err = run(capsys, "train", *RUN, "--attack", "lf", "--attack-preset", "closed_form", "--json")
    assert status == 0 and "pattern='closed'" in json.loads(out)["attack"], err
    status, out, err = run(capsys, "train", *RUN, "--attack", "lira", "--attack-preset", "tiny")
    assert status == 2 and "preset of lira must be one of paper, official, backdoorbench, small, got 'tiny'" in err
    status, out, err = run(capsys, "train", *RUN, "--attack", "lf:closed_form", "--json")
    assert status == 0 and "pattern='closed'" in json.loads(out)["attack"], err


def test_what_a_training_controlled_attack_poisons_is_said(capsys):
    status, out, err = run(capsys, "train", *RUN, "--attack", "bpp")
    assert status == 0 and re.search(r"poisoned images +other ones in each batch", out), err


def test_every_defence_runs_from_the_command_line(capsys):
    short = {
        "rnp": "epochs=1",
        "mnp": "epochs=1",
        "npd": "epochs=1",
        "nad": "p=3",
        "ft-sam": "epochs=1",
        "i-bau": "rounds=1",
    }
    for name, setting in short.items():  # one test: the victim is trained once
        status, out, err = run(
            capsys, "defend", *RUN, "--defense", name, "--set", setting, "--per-class", "6", "--json"
        )
        assert status == 0, err
        said = json.loads(out)["defense"]
        assert said.startswith(names.DEFENCES[name]) and setting in said


def test_a_clean_label_attack_counts_in_its_own_class(capsys):
    status, out, _ = run(capsys, "train", *RUN, "--attack", "sig", "--class-rate", "0.4", "--json")
    record = json.loads(out)
    assert status == 0 and "class_rate=0.4" in record["attack"]
    status, _, err = run(capsys, "train", *RUN, "--attack", "sig", "--rate", "0.1")
    assert status == 2 and "sig has no field 'rate' to set; it has target, class_rate" in err


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_attack_presets(capsys, preset):
    status, out, _ = run(capsys, "train", *RUN, "--attack", "sig", "--attack-preset", preset, "--json")
    assert status == 0 and f"wrapped={preset == 'official'}" in json.loads(out)["attack"]


def test_real_data_and_networks_take_the_papers_settings(monkeypatch):
    from bdlib import attacks, defenses
    from bdlib.lab import Lab

    args = cli._parser().parse_args(["defend", "--dataset", "cifar10", "--attack", "wanet", "--target", "3"])
    lab = Lab("full", dataset="cifar10", network="preact_resnet18", device="cpu")
    assert cli._attack(args, lab) == attacks.WaNet.paper(3) != attacks.WaNet.small(3)
    assert cli._defense(args, lab) == defenses.ANP.paper() != defenses.ANP.small()
    small = Lab("small", dataset="digits", device="cpu")
    assert cli._attack(args, small) == attacks.WaNet.small(3) and cli._defense(args, small) == defenses.ANP.small()


def test_reading_the_command_line_loads_no_torch():
    code = "import sys; from bdlib import __main__ as m; m._parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MATRIX = ["--datasets", "digits", "--networks", "small", "--attacks", "badnets,blend", "--defenses", "none,ft",
          "--clean", "20/class", "--device", "cpu"]  # fmt: skip
NAMES = [f"digits/small/{a}/{d}/0" for a in ("badnets", "blend") for d in ("none", "ft/20/class")]


@pytest.fixture
def computed(monkeypatch):
    """The names of the cells that were computed, by a stand-in that invents their records; a name in `broken` fails."""
    calls = []

    def invent(cell, **more):
        calls.append(str(cell))
        if str(cell) in calls.broken:
            raise calls.broken[str(cell)]
        record = {"dataset": cell.dataset, "network": cell.network, "attack": cell.attack, "rate": cell.rate}
        record |= {"defence": cell.defence, "clean": cell.clean, "seed": cell.seed, "settings": ["X(rate=0.1)", "Y"]}
        record |= {"train_seconds": 1.0, "before": {"acc": 0.9, "asr": 0.8, "ra": 0.1}, "notes": [], "peak_mb": 1.0}
        if cell.defence != "none":
            record |= {"seconds": 2.0, "clean_images": 200, "after": {"acc": 0.9, "asr": 0.2, "ra": 0.6}, "der": 0.8}
        return record | {"device": "none", "torch": "0", "dtype": "float32", "commit": "c", "date": "2000-01-01"}

    calls = type("Calls", (list,), {"broken": {}})()
    monkeypatch.setattr(cells, "run", invent)
    return calls


def test_bench_alone_lists_the_presets_and_their_sizes(capsys, computed):
    status, out, _ = run(capsys, "bench")
    assert status == 2 and "--preset" in out and re.search(r"smoke +6 cells", out) and re.search(r"paper +190", out)
    assert run(capsys, "bench", "--epochs", "3")[0] == 2 and computed == []  # a recipe does not say which cells


def test_bench_shows_each_cell_and_writes_a_report(capsys, computed, tmp_path):
    status, out, _ = run(capsys, "bench", *MATRIX)
    assert status == 0 and computed == NAMES
    rows = out.splitlines()
    assert rows[0].split()[:3] == ["dataset", "network", "attack"] and rows[1].split()[2:5] == [
        "badnets",
        "10%",
        "none",
    ]
    assert "80.0 -> 20.0" in rows[2] and "4 cells, 0 failed" in out
    page = tmp_path / "bench" / "reports" / "matrix" / "report.md"
    assert str(page) in out and "| blend 10% | 90.0 / 80.0 | 90.0 / 20.0 |" in page.read_text()
    own = tmp_path / "elsewhere"
    assert run(capsys, "bench", *MATRIX, "--output", str(own))[0] == 0 and (own / "report.json").exists()


def test_bench_repeats_nothing(capsys, computed):
    assert run(capsys, "bench", *MATRIX)[0] == run(capsys, "bench", *MATRIX)[0] == 0
    assert computed == NAMES
    run(capsys, "bench", *MATRIX, "--seed", "1")
    assert computed[4:] == [n[:-1] + "1" for n in NAMES]


def test_bench_goes_on_after_a_cell_that_fails(capsys, computed, tmp_path):
    computed.broken[NAMES[1]] = RuntimeError("an invented failure")
    status, out, _ = run(capsys, "bench", *MATRIX)
    assert status == 1 and computed == NAMES and "1 failed" in out and "ERROR RuntimeError: an invented failure" in out
    assert f"- {NAMES[1]}: RuntimeError" in (tmp_path / "bench" / "reports" / "matrix" / "report.md").read_text()
    status, out, _ = run(capsys, "bench", *MATRIX, "--list")
    assert status == 0 and f"failed   {NAMES[1]}  (RuntimeError: an invented failure)" in out
    assert "4 cells: 3 there, 0 missing, 1 failed" in out
    computed.broken.clear()
    assert run(capsys, "bench", *MATRIX)[0] == 0 and computed[4:] == [NAMES[1]]


def test_ctrl_c_keeps_the_cells_that_are_done(capsys, computed):
    computed.broken[NAMES[2]] = KeyboardInterrupt()
    status, _, err = run(capsys, "bench", *MATRIX)
    assert status == 130 and "intact" in err and computed == NAMES[:3]
    assert "2 there, 2 missing, 0 failed" in run(capsys, "bench", *MATRIX, "--list")[1]


def test_list_and_only(capsys, computed):
    status, out, _ = run(capsys, "bench", *MATRIX, "--list", "--only", "blend")
    assert status == 0 and computed == [] and out.splitlines()[0] == f"missing  {NAMES[2]}"
    assert "2 cells: 0 there, 2 missing, 0 failed" in out and "badnets" not in out
    assert run(capsys, "bench", *MATRIX, "--only", "blend")[0] == 0 and computed == NAMES[2:]
    listed = json.loads(run(capsys, "bench", *MATRIX, "--list", "--json")[1])
    assert listed["there"] == 2 and listed["cells"] == dict(
        zip(NAMES, ["missing", "missing", "there", "there"], strict=True)
    )


def test_list_of_data_that_are_not_here_says_so_and_downloads_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BDLIB_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr("bdlib.data.real.fetch.download", lambda *a, **k: pytest.fail("downloads"))
    status, out, _ = run(capsys, "bench", "--preset", "chapter", "--list", "--datasets", "cifar10,digits")
    assert status == 0 and "badnets/none/0  (cifar10 is not on this machine)" in out
    assert "missing  digits/preact_resnet18/badnets/none/0\n" in out and "20 cells: 0 there, 20 missing" in out


def test_list_of_damaged_data_gives_the_reason_and_tries_once(capsys, monkeypatch):
    tries = []

    def damaged(*args, **more):
        tries.append(args)
        raise ValueError("digits are damaged")

    cells._lab.cache_clear()  # a lab of an earlier test holds its data
    monkeypatch.setattr("bdlib.lab.datasets.load", damaged)
    status, out, _ = run(capsys, "bench", *MATRIX, "--list")
    assert status == 0 and out.count("(digits are damaged)") == 4 and len(tries) == 1


def test_dry_run_reads_no_data(capsys, computed, monkeypatch):
    monkeypatch.setattr("bdlib.lab.datasets.load", lambda *a, **k: pytest.fail("reads data"))
    status, out, _ = run(capsys, "bench", *MATRIX, "--dry-run")
    assert status == 0 and out.splitlines()[:4] == NAMES and "4 cells: 2 victims and 2 repairs" in out
    # TrojanNN learns from a clean network, which must be trained too
    record = json.loads(run(capsys, "bench", *MATRIX, "--attacks", "trojan", "--dry-run", "--json")[1])
    assert record["victims"] == 2 and record["repairs"] == 1
    assert "190 cells: 19 victims and 171 repairs" in run(capsys, "bench", "--preset", "paper", "--dry-run")[1]
    assert computed == []


def test_lists_stand_in_for_those_of_the_preset(capsys):
    def dry(*args):
        return json.loads(run(capsys, "bench", *args, "--dry-run", "--json")[1])["cells"]

    assert len(dry("--preset", "paper", "--attacks", "wanet", "--defences", "none,anp")) == 2
    assert dry("--attacks", "wanet", "--rates", "0.1,0.01", "--defences", "none") == [
        "cifar10/preact_resnet18/wanet/0.1/none/0", "cifar10/preact_resnet18/wanet/0.01/none/0"]  # fmt: skip
    assert dry("--preset", "paper", "--attacks", "wanet", "--rates", "own", "--defences", "none")[0].count("0.1") == 0
    assert dry("--defences", "anp", "--clean", "500, 1%", "--seeds", "3")[1].endswith("anp/1%/3")


def test_a_matrix_from_a_file(capsys, tmp_path, computed):
    path = tmp_path / "mine.toml"
    path.write_text('datasets = ["digits"]\nnetworks = ["small"]\ndefences = ["none"]\n')
    assert run(capsys, "bench", "--matrix", str(path), "--device", "cpu")[0] == 0 and computed == NAMES[:1]
    assert (tmp_path / "bench" / "reports" / "mine" / "report.md").exists()
    path.write_text('datasets = ["digits"]\n# a remark\natacks = ["badnets"]\n')
    status, _, err = run(capsys, "bench", "--matrix", str(path))
    assert status == 2 and f"{path}, line 3: unknown key 'atacks'; known are datasets" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--preset", "papers"],
            "--preset must be one of smoke, cpu, cpu-attacks, chapter, paper, gtsrb, low-data, got",
        ),
        (["--attacks", "badnets,badnet"], "attack must be one of badnets, blend"),
        (["--attacks", "wanet:fast"], "preset of wanet must be one of paper"),
        (["--defences", "amp"], "defence must be one of anp, rnp"),
        (["--datasets", "imagenet"], "datasets must be of signs, digits, cifar10"),
        (["--networks", "alexnet"], "networks must be of small, resnet18"),
        (["--seeds", "one"], "--seeds must be seeds, got 'one'"),
        (["--rates", "5"], "rates must be in [0, 1], got 5.0"),
        (["--clean", "many"], 'clean must be a number of images ("500")'),
        (["--attacks", ","], "attacks is empty"),
        ([*MATRIX, "--only", "wanet"], f"no cell's name contains 'wanet'; the first is {NAMES[0]}"),
        ([*MATRIX, "--workers", "3"], "--scheduler and --workers need --engine dask"),
        (["records", "--preset", "smoke"], "--preset belongs to a matrix; bench records does not take it"),
        (["gallery", "--dry-run"], "--dry-run belongs to a matrix; bench gallery does not take it"),
        (["export", *MATRIX], "none of the 4 cells is there; run them first"),
        (["--matrix", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_input_of_bench(capsys, computed, args, words):
    status, out, err = run(capsys, "bench", *args)
    assert status == 2 and out == "" and words in err and err.startswith("error: ") and computed == []


def test_a_gpu_that_is_not_there(capsys, computed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for more in ([], ["--list"]):
        status, _, err = run(capsys, "bench", *MATRIX[:-1], "cuda", *more)
        assert status == 2 and re.search(r"'cuda' was asked for; torch .* finds no GPU here", err) and computed == []
    monkeypatch.setenv("BDLIB_DEVICE", "cuda")
    assert "'cuda' was asked for" in run(capsys, "bench", *MATRIX[:-2])[2]


def test_json_of_bench_has_stdout_to_itself(capsys, computed):
    computed.broken[NAMES[3]] = RuntimeError("an invented failure")
    status, out, err = run(capsys, "bench", *MATRIX, "--json")
    record = json.loads(out)
    assert status == 1 and record["failed"] == [NAMES[3]] and len(record["records"]) == 4 and "badnets" in err


def test_export_and_compare_take_what_is_there(capsys, computed, tmp_path):
    computed.broken[NAMES[3]] = RuntimeError("an invented failure")
    run(capsys, "bench", *MATRIX)
    path = tmp_path / "mine.jsonl"
    status, out, _ = run(capsys, "bench", "export", *MATRIX, "--seeds", "0,1", "--output", str(path))
    assert status == 0 and "3 records written" in out and "4 missing, 1 failed" in out
    assert [json.loads(text)["defence"] for text in path.read_text().splitlines()] == ["none", "ft", "none"]
    status, out, _ = run(capsys, "bench", "compare", *MATRIX)
    assert status == 0 and f"no published value: {', '.join(NAMES[:3])}" in out and len(computed) == 4


def test_dask_is_asked_for_by_name(capsys, computed, monkeypatch):
    asked = []

    def spread(scheduler, **more):
        asked.append((scheduler, more))
        return lambda todo: ((c, cells.safely(c)) for c in reversed(todo))

    monkeypatch.setitem(sys.modules, "bdlib.cluster", types.SimpleNamespace(spread=spread))
    monkeypatch.setattr("bdlib.commands.find_spec", lambda name: name)
    args = ["--engine", "dask", "--scheduler", "tcp://nowhere:1", "--workers", "3"]
    assert run(capsys, "bench", *MATRIX, *args)[0] == 0
    assert asked == [("tcp://nowhere:1", {"workers": 3, "device": "cpu", "verify": True})] and computed == NAMES[::-1]
    monkeypatch.setattr("bdlib.commands.find_spec", lambda name: None)
    status, _, err = run(capsys, "bench", *MATRIX, *args)
    assert status == 2 and 'pip install "bdlib[cluster]"' in err


def test_one_real_cell_from_the_command_line(capsys, tmp_path):
    args = [*MATRIX, "--attacks", "badnets", "--defences", "none", "--epochs", "1", "--output", str(tmp_path / "r")]
    status, out, err = run(capsys, "bench", *args)
    (record,) = json.loads((tmp_path / "r" / "report.json").read_text())
    assert status == 0, err
    assert (
        0 <= record["before"]["asr"] <= 1 and record["epochs"] == 1 and record["commit"] and "1 cells, 0 failed" in out
    )


def test_speed_writes_its_record(capsys, monkeypatch, tmp_path):
    asked = []
    result = {"quick": True, "matmul": {"float32": 1e9}, "peak_bytes": 1.0, "seconds": 1.0}
    result |= {"device": "Some CPU", "dtype": "float32"}
    monkeypatch.setattr("bdlib.speed.measure", lambda device: asked.append(device) or result)
    status, out, _ = run(capsys, "bench", "speed")
    assert status == 0 and json.loads((tmp_path / "bench" / "speed.json").read_text()) == result
    assert "Some CPU" in out and str(tmp_path / "bench" / "speed.json") in out
    status, _, _ = run(capsys, "bench", "speed", "--device", "cpu", "-o", str(tmp_path / "mine.json"))
    assert status == 0 and json.loads((tmp_path / "mine.json").read_text()) == result and asked == [None, "cpu"]
