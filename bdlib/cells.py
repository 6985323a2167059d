"""The entries of the matrix: how each is computed, and its record, one file in the store.

    records = make(PRESETS["smoke"].cells())           # computes what is missing; killed at any point, run it again
    for cell, key, record in status(cells): ...        # what is there

A record is written whole or not at all. Its key is a hash of the settings, the data and the code that computes it, so
nothing stale is served, and what one matrix has computed another finds.
"""

import json
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bdlib import files, names, provenance, store
from bdlib.bench import rounded
from bdlib.data.imageset import ImageSet
from bdlib.lab import HELD_OUT, SCALES, Lab
from bdlib.machine import device_of, peak_bytes
from bdlib.matrix import Cell
from bdlib.metrics import Scores, accuracy, der, evaluate
from bdlib.neurons import curve, grid
from bdlib.triggers import Trigger

RESERVE = {"signs": 1000, "digits": 400, "gtsrb": 1500}  # kept from the victim for the defender; 5,000 elsewhere


@lru_cache(maxsize=4)
def _lab(dataset: str, network: str, recipe: tuple[Any, ...], device: str, verify: bool) -> Lab:
    # one for all cells of a data set: reading and hashing 60,000 images takes seconds
    scale = SCALES["small" if network == "small" else "full"]
    changed = dict(zip(("epochs", "batch", "lr"), recipe, strict=True))
    chosen = replace(scale.recipe, **{k: v for k, v in changed.items() if v is not None})
    reserve = RESERVE.get(dataset, 5000)
    return Lab("full", dataset=dataset, network=network, recipe=chosen, reserve=reserve, device=device, verify=verify)


def lab_of(cell: Cell, *, device: str = "", verify: bool = True) -> Lab:
    """Data, network and recipe of a cell. Raises ValueError as `bdlib.machine.device_of`."""
    return _lab(cell.dataset, cell.network, (cell.epochs, cell.batch, cell.lr), device_of(device), verify)


@lru_cache(maxsize=8)
def _fingerprints(lab: Lab) -> tuple[str, ...]:
    return tuple(part.fingerprint() for part in (lab.train, lab.pool, lab.test))


def key_of(cell: Cell, lab: Lab) -> str:
    """What a record must carry to be current: settings, data, device type and the code that computes it."""
    attack, defence = names.attack(cell.attack, lab, rate=cell.rate), names.defence(cell.defence, cell.network)
    modules = [type(m).__module__ for m in (attack, defence) if m is not None]
    code = provenance.fingerprint("bdlib.metrics", "bdlib.training", "bdlib.models", *modules)
    dtype = str(provenance.amp_dtype(lab.device) or torch.float32).removeprefix("torch.")
    return store.key(
        cell=asdict(cell), attack=repr(attack), defence=repr(defence), scale=repr(lab.scale), data=_fingerprints(lab),
        held_out=HELD_OUT, code=code, device_type=torch.device(lab.device).type, dtype=dtype,
    )  # fmt: skip


def scores(model: nn.Module, test: ImageSet, trigger: Trigger | None) -> dict[str, float]:
    """ACC, ASR and RA; ACC alone where there is no trigger."""
    if trigger is None:
        return {"acc": accuracy(model, test)}
    return evaluate(model, test, trigger).asdict()


@contextmanager
def _quick() -> Iterator[None]:
    # shapes never change inside a cell, so the fastest convolution is worth a search; TF32 where no autocast is on
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def run(cell: Cell, *, device: str = "", verify: bool = True) -> dict[str, Any]:
    """Compute one cell: train its victim or find it in the store, repair it, score both.

    Returns:
        A record: the cell's fields and its key, the attack and defence in full (`settings`), poisoned (images), before
        and after (scores, shares in [0, 1]), train_seconds, seconds and cpu_seconds (of the defence), clean_images,
        der, threshold, pruned, oracle (if the cell wants curves), peak_mb, notes of the data, and `run_info`.
    """
    lab = lab_of(cell, device=device, verify=verify)
    attack, defence = names.attack(cell.attack, lab, rate=cell.rate), names.defence(cell.defence, cell.network)
    record: dict[str, Any] = {"key": key_of(cell, lab), **asdict(cell)}
    record["settings"] = [repr(attack), repr(defence)]
    if torch.device(lab.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with _quick():
        victim = lab.victim(attack, seed=cell.seed)
        record |= {"poisoned": len(victim.indices), "train_seconds": victim.facts["seconds"]}
        record["before"] = scores(victim.model, lab.test, victim.trigger)
        if defence is not None:
            whole = len(lab.train) + len(lab.pool)  # papers count the budget in shares of the whole training set
            clean = lab.clean(**names.budget(cell.clean, whole), seed=cell.seed)
            start = time.process_time()
            repair = defence(victim.model, clean, seed=cell.seed)
            record |= {"seconds": repair.seconds, "cpu_seconds": time.process_time() - start}
            record |= {"clean_images": len(clean), "after": scores(repair.model, lab.test, victim.trigger)}
            record |= {k: repair.details[k] for k in ("threshold", "pruned", "share") if k in repair.details}
            if victim.trigger is not None:
                record["der"] = der(Scores(**record["before"]), Scores(**record["after"]))
                if cell.curves and "masks" in repair.details:
                    record["oracle"] = curve(victim.model, repair.details["masks"], grid(), lab.test, victim.trigger)
    peak = peak_bytes(lab.device)
    record |= {"peak_mb": peak and peak / 2**20, "notes": list(lab.train.notes)}
    return rounded(record) | provenance.run_info(lab.device)


def failed(cell: Cell, error: BaseException) -> dict[str, Any]:
    """The record of a cell that could not be computed."""
    trace = "".join(traceback.format_exception(error, limit=-3))
    return {**asdict(cell), "error": f"{type(error).__name__}: {error}", "traceback": trace}


def safely(cell: Cell, *, device: str = "", verify: bool = True) -> dict[str, Any]:
    """`run`, but an error becomes the record: one bad cell must not cost the others."""
    try:
        return run(cell, device=device, verify=verify)
    except Exception as error:
        return failed(cell, error)


def _path(key: str) -> Path:
    return files.store_folder() / "bench" / f"{key}.json"


def load(key: str) -> dict[str, Any] | None:
    """The record under this key; None where there is none, or a damaged one, which a warning names."""
    path = _path(key)
    if not path.exists():
        return None
    try:
        digest, _, body = path.read_text(encoding="utf-8").partition("\n")
        if sha256(body.encode()).hexdigest() != digest:
            raise ValueError("its SHA-256 differs from the stored one")
        return json.loads(body)
    except (ValueError, OSError) as error:
        warnings.warn(f"the record {path} is damaged ({error}); it is made anew", stacklevel=2)
        return None


def save(key: str, record: dict[str, Any]) -> None:
    """Keep a record, whole or not at all."""
    body = json.dumps(record)
    files.write_bytes(_path(key), f"{sha256(body.encode()).hexdigest()}\n{body}".encode())


def status(
    cells: Sequence[Cell], *, device: str = "", verify: bool = True
) -> Iterator[tuple[Cell, str, dict[str, Any] | None]]:
    """Each cell with its key and its record; a record with an "error" is one that failed, None is missing or stale."""
    for cell in cells:
        key = key_of(cell, lab_of(cell, device=device, verify=verify))
        yield cell, key, load(key)


Engine = Callable[[Sequence[Cell]], Iterator[tuple[Cell, dict[str, Any]]]]


def make(
    cells: Sequence[Cell],
    *,
    device: str = "",
    verify: bool = True,
    engine: Engine | None = None,
    show: Callable[[Cell, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Compute what is missing, stale or failed, and keep each record as soon as it is there.

    Args:
        cells: as from `Matrix.cells`.
        engine: computes cells and yields each with its record, in any order; None computes them here, one by one.
        show: called with every cell and its record, those that were there first.

    Returns:
        The records of all cells, in their order; those that failed carry "error".
    """
    found = {cell: (key, record) for cell, key, record in status(cells, device=device, verify=verify)}
    done = {c: record for c, (_, record) in found.items() if record is not None and "error" not in record}
    todo = [c for c in found if c not in done]
    for cell, record in done.items():
        if show is not None:
            show(cell, record)
    results = engine(todo) if engine else ((c, safely(c, device=device, verify=verify)) for c in todo)
    try:
        for cell, record in tqdm(results, total=len(todo), desc="cells", leave=False):
            save(found[cell][0], record)
            done[cell] = record
            if show is not None:
                show(cell, record)
    finally:
        if isinstance(results, Generator):
            results.close()  # Ctrl-C: a cluster must not outlive it, whoever holds the traceback
    return [done[c] for c in cells]
