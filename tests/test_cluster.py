"""The matrix on a cluster: the same records, whoever dies; a worker that differs is refused."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("distributed")

import torch
from distributed import Client, LocalCluster, WorkerPlugin

from bdlib import cells, cluster, files, provenance
from bdlib.cluster import spread
from bdlib.matrix import Matrix

KILLER = 666  # the seed of a cell that kills its worker
INSIDE = {"processes": False, "protocol": "tcp", "dashboard_address": None}
TINY = Matrix(("digits",), ("small",), ("badnets",), defences=("none", "ft"), clean=("2/class",), epochs=1)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of its own for each test."""
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


class Deadly(WorkerPlugin):
    """On every worker, and on those that replace them: one cell kills each, the cell of seed 1 kills the first only."""

    name = "deadly"

    def setup(self, worker):
        good = cells.run

        def run(cell, **more):
            once = files.store_folder() / "killed"
            once.parent.mkdir(parents=True, exist_ok=True)
            record = None if cell.seed == KILLER else good(cell, **more)
            if cell.seed == KILLER or (cell.seed == 1 and not once.exists()):
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)  # computed, and not yet told
            return record

        cells.run = run


def same(record):
    # what must not depend on where and when a cell was computed
    volatile = ("seconds", "cpu_seconds", "train_seconds", "peak_mb", "commit", "date")
    return {k: v for k, v in record.items() if k not in volatile}


@pytest.mark.slow
def test_two_workers_give_the_local_records_though_one_is_killed_and_a_cell_kills_whom_it_meets(
    store, tmp_path, monkeypatch
):
    clients = []

    class Seen(Client):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            clients.append(self)
            self.register_plugin(Deadly())

    monkeypatch.setattr(cluster, "Client", Seen)
    monkeypatch.setattr(cluster, "DEATHS", 2)
    good = [*TINY.cells(), *replace(TINY, attacks=("blend",), defences=("none",), seeds=(1,)).cells()]
    deadly = replace(TINY, seeds=(KILLER,)).cells()
    records = dict(spread(None, workers=2)([*deadly, *good]))
    assert (store / "killed").exists() and records.keys() == {*good, *deadly}
    assert [records[c]["error"] for c in deadly] == [f"RuntimeError: 2 workers died of {deadly[0]}"] * 2
    assert [c.status for c in clients] == ["closed"] and not multiprocessing.active_children()
    monkeypatch.setenv("BDLIB_STORE", str(tmp_path / "other"))  # trained again, here
    for cell in good:
        assert same(records[cell]) == same(cells.run(cell, device="cpu")), str(cell)


def leave(of):
    """Dismiss all workers of a cluster."""
    of.scale(0)
    while of.scheduler.workers:
        time.sleep(0.05)


@pytest.fixture
def inside(monkeypatch):
    """Workers are threads of this process, which a patched `cells.run` reaches; the clusters that were started."""
    made = []

    def start(**options):
        assert options.pop("env")["TQDM_DISABLE"] == "1"  # workers must not draw bars over ours
        made.append(LocalCluster(**(options | INSIDE)))
        return made[-1]

    monkeypatch.setattr(cluster, "LocalCluster", start)
    monkeypatch.setattr(cells, "run", lambda cell, **more: {"seed": cell.seed})
    return made


@pytest.mark.parametrize("defences", [("none", "ft", "fp"), ("ft", "fp", "nad")])
def test_a_victim_is_trained_before_its_repairs_and_two_cells_at_a_time(inside, monkeypatch, defences):
    spans, begun, both = {}, set(), threading.Barrier(2, timeout=60)

    def run(cell, **more):
        start = time.monotonic()
        if cell.victim not in begun:
            begun.add(cell.victim)
            both.wait()  # broken, and an error, unless the two victims are trained at the same time
        spans[cell] = (start, time.monotonic())
        return {}

    monkeypatch.setattr(cells, "run", run)
    todo = replace(TINY, attacks=("badnets", "blend"), defences=defences).cells()
    records = dict(spread(None, workers=2)(todo[::-1]))  # whatever order they come in
    assert records == {cell: {} for cell in todo} and spans.keys() == set(todo)
    for victim in {c.victim for c in todo}:
        own = sorted(spans[c] for c in todo if c.victim == victim)
        assert own[0][1] <= own[1][0]  # the first one ends before any other begins
        assert "none" not in defences or own[0] == spans[victim]


def test_tasks_get_this_process_number_of_threads_its_device_and_verify(inside, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(n))
    monkeypatch.setattr(cells, "run", lambda cell, **more: seen.append(more) or {})
    monkeypatch.setenv("BDLIB_DEVICE", "cpu")  # resolved here: a worker may have another default
    list(spread(None, workers=1, verify=False)(TINY.cells()[:1]))
    assert seen == [7, {"device": "cpu", "verify": False}]


def test_a_failing_cell_is_an_error_record_and_the_rest_goes_on(inside, monkeypatch):
    monkeypatch.setattr(cells, "run", lambda cell, **more: {"n": 1 / (cell.defence == "ft")})
    first, second = cells.make(TINY.cells(), engine=spread(None, workers=1))
    assert first["error"].startswith("ZeroDivisionError") and first["defence"] == "none" and second == {"n": 1.0}
    assert "lambda" in first["traceback"]


def test_a_record_computed_from_other_data_is_not_taken(inside, monkeypatch):
    cell = TINY.cells()[0]
    key = cells.key_of(cell, cells.lab_of(cell))
    monkeypatch.setattr(cells, "run", lambda cell, **more: {"key": key})
    assert list(spread(None, workers=1)([cell])) == [(cell, {"key": key})]
    monkeypatch.setattr(cells, "run", lambda cell, **more: {"key": key[::-1]})
    [(_, record)] = spread(None, workers=1)([cell])
    assert "has other data" in record["error"] and "key" not in record


def test_a_worker_with_other_code_is_refused_by_name_before_anything_is_computed(inside, monkeypatch):
    monkeypatch.setattr(cells, "run", lambda cell, **more: pytest.fail("computed"))
    codes = itertools.count()
    monkeypatch.setattr(provenance, "fingerprint", lambda *modules: f"code {next(codes)}")
    with pytest.raises(ValueError, match=r"worker tcp://\S+ would give other .*bdlib is code 1 there and code 0 here"):
        list(spread(None, workers=1)(TINY.cells()))
    answers = iter(["code"])
    monkeypatch.setattr(provenance, "fingerprint", lambda *modules: next(answers))
    with pytest.raises(ValueError, match=r"worker tcp://\S+ cannot compute cells: "):
        list(spread(None, workers=1)(TINY.cells()))


def test_a_worker_of_several_threads_is_refused():
    refused = pytest.raises(ValueError, match=r"worker tcp://\S+ has 2 threads.*--nthreads 1")
    with LocalCluster(1, threads_per_worker=2, **INSIDE) as several, refused:
        list(spread(several.scheduler_address)(TINY.cells()))


def test_nobody_at_the_address_nobody_at_work(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    with pytest.raises(OSError, match=r"no dask scheduler answers: .*tcp://127.0.0.1:9 after"):
        list(spread("tcp://127.0.0.1:9")(TINY.cells()))
    for address in ("nonsense", "127.0.0.1:port", "http://127.0.0.1:80"):
        with pytest.raises(ValueError, match=f"scheduler must be like tcp://.*, got '{address}'"):
            spread(address)
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        spread(None, workers=0)
    with LocalCluster(1, threads_per_worker=1, **INSIDE) as empty:
        leave(empty)
        with pytest.raises(OSError, match=f"scheduler at {empty.scheduler_address} has no worker; start one"):
            list(spread(empty.scheduler_address)(TINY.cells()))


def test_nothing_to_do_starts_no_cluster(inside):
    assert list(spread(None)([])) == list(spread("tcp://127.0.0.1:9")([])) == [] == inside


def test_workers_that_all_leave_end_the_run(inside, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.2)
    results = spread(None, workers=1)(TINY.cells())
    assert next(results)[1] == {"seed": 0}
    leave(inside[0])
    with pytest.raises(OSError, match="no worker for 0 seconds; what was finished is kept"):
        next(results)


def test_ctrl_c_begins_no_further_cell_keeps_what_is_done_and_closes_the_cluster(inside, monkeypatch):
    begun = []

    def run(cell, **more):
        begun.append(cell)
        return {"seed": cell.seed}

    def stop(cell, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "run", run)
    todo = replace(TINY, seeds=(0, 1, 2, 3), defences=("none",)).cells()
    with pytest.raises(KeyboardInterrupt) as held:  # holds the traceback, as a notebook does
        cells.make(todo, engine=spread(None, workers=1), show=stop)
    assert inside[0].status.name == "closed" and begun == todo[:1] and held
    assert [record for *_, record in cells.status(todo)] == [{"seed": 0}, None, None, None]
