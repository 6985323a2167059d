"""The command line: tables, JSON, overrides, bad input, interruption."""

import json
import re

import pytest

from bdlib import __main__ as cli

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

    assert set(cli.ATTACKS.values()) == {kind.__name__ for kind in attacks.KINDS}
    assert set(cli.DEFENSES.values()) == set(defenses.__all__) - {"Repair"}


def test_any_preset_of_an_attack_can_be_named(capsys):
    status, out, err = run(capsys, "train", *RUN, "--attack", "lf", "--attack-preset", "closed_form", "--json")
    assert status == 0 and "pattern='closed'" in json.loads(out)["attack"], err
    status, out, err = run(capsys, "train", *RUN, "--attack", "lira", "--attack-preset", "tiny")
    assert status == 2 and "--attack-preset tiny: lira has paper, official, backdoorbench, small" in err


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
        assert said.startswith(cli.DEFENSES[name]) and setting in said


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
