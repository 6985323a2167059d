"""The matrix on several processes or machines, one cell a task: an engine for `bdlib.cells.make`, by dask.distributed.

make(cells, engine=spread(None, workers=2))        # worker processes on this machine
make(cells, engine=spread("tcp://10.0.0.5:8786"))  # there `dask scheduler`, and `dask worker --nthreads 1` anywhere
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import torch
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, wait
from distributed.comm import get_address_host_port

from bdlib import provenance
from bdlib.cells import Engine, failed, key_of, lab_of, safely
from bdlib.matrix import Cell

ANSWER, PATIENCE = 5.0, 60.0  # seconds for a scheduler and a worker to answer; to go on without a single worker
DEATHS = 3  # that many workers lost, and a cell is given up


def spread(scheduler: str | None, *, workers: int = 2, device: str = "", verify: bool = True) -> Engine:
    """An engine that gives each cell to a free worker; the first cell of a victim goes before its others.

    The records are those of the local engine: same seeds, same code, and each task sets the number of torch threads of
    this process. What else a number depends on must be the same and is checked: the code of bdlib and the version of
    torch before anything is computed, data, kind of device and number type with each record. Two kinds of processor
    may still differ in the last digits.

    Each worker is a process of one dask thread (cells share the random state of their process) that finds the data
    under its own BDLIB_DATA and keeps victims under its own BDLIB_STORE. A folder that all share trains each victim
    once; folders of their own, once a worker. A worker takes the GPU that CUDA_VISIBLE_DEVICES leaves it.

    A dead worker's cell is done again by another, after the rest; one that has cost three workers becomes an error
    record. Ctrl-C begins no further cell and closes the cluster; a worker that was not started here still ends its
    cell, whose record is lost.

    Args:
        scheduler: address such as ``"tcp://10.0.0.5:8786"``; None starts `workers` processes on this machine.
        workers: 1 or more; their threads, as many as this process has, add up: see OMP_NUM_THREADS.
        device, verify: as in `bdlib.cells.run`.

    Raises:
        ValueError: not an address; fewer than one worker; from the engine: a worker that differs, which is named.
        OSError: from the engine: no scheduler at the address, no worker, or all of them lost for a minute.
    """
    if scheduler is None and workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if scheduler is not None:
        try:
            get_address_host_port(scheduler)
        except ValueError as error:
            raise ValueError(f"scheduler must be like tcp://10.0.0.5:8786, got {scheduler!r}: {error}") from None

    def engine(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        if cells:
            with _client(scheduler, workers) as client:
                yield from _compute(client, cells, device, verify)

    return engine


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Client]:
    with ExitStack() as stack:
        address: Any = scheduler
        if scheduler is None:
            address = stack.enter_context(
                LocalCluster(
                    n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None,
                    silence_logs=logging.CRITICAL, env={"TQDM_DISABLE": "1"},
                )
            )  # fmt: skip
        try:
            client = stack.enter_context(Client(address, timeout=ANSWER, set_as_default=False))
        except OSError as error:
            raise OSError(f"no dask scheduler answers: {error}") from None
        try:
            client.wait_for_workers(1, timeout=ANSWER)
        except TimeoutError:
            raise OSError(f"the scheduler at {scheduler} has no worker; start one: dask worker {scheduler}") from None
        yield client


def _facts(device: str) -> dict[str, str]:
    return {"bdlib": provenance.fingerprint("bdlib.cells"), "torch": torch.__version__,
            "number type": provenance.run_info(device)["dtype"]}  # fmt: skip


def _check(client: Client, threads: dict[str, int], device: str) -> None:
    here = _facts(device)
    for worker, there in client.run(_facts, device, workers=list(threads), on_error="return").items():
        if isinstance(there, OSError):  # it left in between
            continue
        if isinstance(there, Exception):
            raise ValueError(f"worker {worker} cannot compute cells: {type(there).__name__}: {there}")
        if wrong := [f"{k} is {there[k]} there and {here[k]} here" for k in here if there[k] != here[k]]:
            raise ValueError(f"worker {worker} would give other results: {', '.join(wrong)}")
    for worker, count in threads.items():
        if count != 1:
            raise ValueError(f"worker {worker} has {count} threads, and cells share a random state; use --nthreads 1")


def _task(cell: Cell, key: str, threads: int, device: str, verify: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)  # here, not once a worker: OpenMP keeps the number for each thread
    record = safely(cell, device=device, verify=verify)
    if record.get("key", key) != key:
        where = f"the worker on {socket.gethostname()}"
        return failed(cell, ValueError(f"{where} has other data, code or another number type than this machine"))
    return record


def _finished(client: Client, futures: list[Future]) -> set[Future]:
    # waits a second at most, to look for workers that came or went
    if not futures:
        time.sleep(0.2)
        return set()
    try:
        with client.as_current():
            return set(wait(futures, timeout=1, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return set()
    except CancelledError:
        raise OSError("the scheduler is gone; what was finished is kept") from None


def _record(cell: Cell, future: Future, lost: bool) -> dict[str, Any] | None:
    # None where the worker died, before or after it was done
    try:
        if not lost:
            return future.result(timeout=PATIENCE)
    except (TimeoutError, KilledWorker):
        pass
    except Exception as error:  # not from the cell, which records its own: a worker that cannot even load bdlib
        return failed(cell, error)
    future.cancel()
    return None


def _compute(client: Client, cells: Sequence[Cell], device: str, verify: bool) -> Iterator[tuple[Cell, dict[str, Any]]]:
    # One task a worker, and placed here: dask blames a death on every task that the worker had queued
    device = str(lab_of(cells[0], device=device, verify=verify).device)
    first = {c.victim: c for c in reversed(cells)} | {c: c for c in cells if c == c.victim}  # trains, if anyone must
    waiting, running, deaths = list(cells), dict[Future, tuple[Cell, str]](), Counter[Cell]()
    checked, alive = set[str](), time.monotonic()
    while waiting or running:
        threads = client.nthreads()
        if new := {w: n for w, n in threads.items() if w not in checked}:
            _check(client, new, device)
            checked |= set(new)
        alive = time.monotonic() if threads else alive
        if time.monotonic() - alive > PATIENCE:
            raise OSError(f"no worker for {PATIENCE:.0f} seconds; what was finished is kept")
        pending = {*waiting, *(cell for cell, _ in running.values())}
        ready = [c for c in waiting if first[c.victim] == c or first[c.victim] not in pending]
        free = threads.keys() - {worker for _, worker in running.values()}
        for worker, cell in zip(sorted(free), ready, strict=False):
            waiting.remove(cell)
            key = key_of(cell, lab_of(cell, device=device, verify=verify))
            task = (cell, key, torch.get_num_threads(), device, verify)
            name = f"{cell}-{uuid4().hex}"  # its own: an older result under this name may be stale
            running[client.submit(_task, *task, key=name, workers=[worker], pure=False)] = (cell, worker)
        lost = {f for f, (_, worker) in running.items() if worker not in threads and not f.done()}
        for future in lost | _finished(client, [f for f in running if f not in lost]):
            cell, _ = running.pop(future)
            record = _record(cell, future, future in lost)
            deaths[cell] += record is None
            if record is not None:
                yield cell, record
            elif deaths[cell] < DEATHS:
                waiting.append(cell)  # the others first, it may be this one that kills
            else:
                doomed = [cell, *(c for c in waiting if c.victim == cell)]  # its repairs would do the same again
                for c in doomed:
                    yield c, failed(c, RuntimeError(f"{deaths[cell]} workers died of {cell}"))
                waiting = [c for c in waiting if c not in doomed]
