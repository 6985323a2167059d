"""The options of `python -m bdlib bench`, and what it does with them.

python -m bdlib bench --preset smoke               # what is missing is computed; killed at any point, run it again
python -m bdlib bench --preset paper --list        # what is there
python -m bdlib bench export --preset paper        # compact records for the book
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bdlib import names
from bdlib.records import RESULTS

LISTS = {
    "datasets": "data sets", "networks": "networks", "attacks": "attacks, e.g. badnets,wanet:official",
    "rates": "shares of all images to poison, or: own", "defences": "defences, e.g. none,anp,rnp:official",
    "clean": "clean budgets, e.g. 500,5%%,10/class", "seeds": "seeds",
}  # fmt: skip
# options that say nothing to the records, the gallery and the measurements
OF_MATRIX = (*LISTS, "preset", "matrix", "epochs", "batch", "lr", "curves", "device", "dry_run", "engine", "scheduler",
             "workers", "output")  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    parser.add_argument("what", nargs="?", default="matrix", help="matrix (default): run it; export: write its compact "
                        "records; compare: print published values beside; records, gallery: those of the book; speed, "
                        "poison: measure this machine",
                        choices=("matrix", "export", "compare", "records", "gallery", "speed", "poison"))  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", metavar="NAME", help="a matrix by name; plain `bench` lists them")
    which.add_argument(
        "--matrix", metavar="FILE", type=Path, help="a matrix in TOML: the fields of bdlib.matrix.Matrix"
    )
    for name, what in LISTS.items():
        also = {"defences": ["--defenses"], "seeds": ["--seed"]}.get(name, [])
        parser.add_argument(f"--{name}", *also, dest=name, metavar="A,B", help=f"{what}, in place of the matrix's own")
    parser.add_argument("--epochs", type=int, help="train victims this long")
    parser.add_argument("--batch", type=int, help="batch size of the victims' training")
    parser.add_argument("--lr", type=float, help="peak learning rate of the victims' training")
    parser.add_argument("--curves", action="store_true", help="also ACC and ASR against the threshold (oracle)")
    parser.add_argument("--device", help="cpu, cuda (default: BDLIB_DEVICE, else a GPU if there is one)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells, or experiments, whose name contains this")
    parser.add_argument("--list", action="store_true", help="say what is there; compute nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what the matrix holds; read no data")
    parser.add_argument("--engine", choices=("local", "dask"), help="dask: spread the cells over a cluster")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a dask cluster (default: start one here)")
    parser.add_argument("--workers", type=int, help="worker processes of a cluster that is started here (default 2)")
    parser.add_argument("-o", "--output", type=Path, help="folder of the report; of export and speed: the file")


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Run a matrix of attacks and defences, make the book's records, or measure speed on this machine."""
    if args.what not in ("matrix", "export", "compare"):
        free = ("device", "output") if args.what == "speed" else ()
        for name in (n for n in OF_MATRIX if n not in free):
            if getattr(args, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} belongs to a matrix; bench {args.what} does not take it")
        return _measure(args) if args.what in ("speed", "poison") else _records(args)
    if (args.scheduler or args.workers is not None) and args.engine != "dask":
        raise ValueError("--scheduler and --workers need --engine dask")
    from bdlib.matrix import PRESETS

    found = _matrix(args)
    if found is None:
        sizes = {k: len(m.cells()) for k, m in PRESETS.items()}
        rows = [f"  {k:<10} {n:>4} cells" for k, n in sizes.items()]
        text = ["name a matrix: --preset NAME, --matrix FILE, or lists such as --attacks badnets,blend", *rows]
        return {"record": {"presets": sizes}, "text": "\n".join(text), "status": 2}
    name, matrix = found
    cells = [c for c in matrix.cells() if args.only in str(c)]
    if not cells:
        raise ValueError(f"no cell's name contains {args.only!r}; the first is {matrix.cells()[0]}")
    if args.only:
        name += f"-{re.sub('[^A-Za-z0-9]+', '-', args.only).strip('-')}"
    if args.dry_run:
        return _dry_run(cells)
    device = args.device or ""
    if args.list:
        return _list(_status(cells, device, args.verify))
    return {"matrix": _run, "export": _export, "compare": _compare}[args.what](name, cells, device, args)


def _matrix(args: argparse.Namespace) -> tuple[str, Any] | None:
    """The matrix asked for, and its name; None where nothing says which."""
    from bdlib.matrix import PRESETS, Matrix

    given: dict[str, Any] = {}
    for name in LISTS:
        if (text := getattr(args, name)) is not None:
            kind = {"rates": float, "seeds": int}.get(name, str)
            items = [t.strip() for t in text.split(",") if t.strip()]
            try:
                given[name] = () if name == "rates" and items == ["own"] else tuple(kind(t) for t in items)
            except ValueError:
                raise ValueError(f"--{name} must be {LISTS[name]}, got {text!r}") from None
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {args.preset!r}")
    if args.matrix is not None:
        found = args.matrix.stem, Matrix.read(args.matrix)
    elif args.preset is not None or given:
        found = args.preset or "matrix", PRESETS[args.preset] if args.preset else Matrix()
    else:
        return None
    given |= {k: getattr(args, k) for k in ("epochs", "batch", "lr") if getattr(args, k) is not None}
    return found[0], replace(found[1], **given, curves=args.curves or found[1].curves)


def _dry_run(cells: Sequence[Any]) -> dict[str, Any]:
    from bdlib.lab import Lab

    victims = dict.fromkeys(c.victim for c in cells)
    for victim in list(victims):  # some attacks learn their trigger from a clean network
        lab = Lab("small", dataset=victim.dataset, device="cpu")
        if getattr(names.attack(victim.attack, lab), "needs_model", False):
            victims[replace(victim, attack="none", rate=None)] = None
    repairs = sum(c.defence != "none" for c in cells)
    said = f"{len(cells)} cells: {len(victims)} victims and {repairs} repairs, less what is in the store (--list)"
    record = {"cells": [str(c) for c in cells], "victims": len(victims), "repairs": repairs}
    return {"record": record, "text": "\n".join([*map(str, cells), said])}


def _status(cells: Sequence[Any], device: str, verify: bool) -> Iterator[tuple[Any, str, dict[str, Any] | None]]:
    """Each cell, why it cannot be looked up ("" if it can), and its record; nothing is downloaded."""
    from bdlib import data
    from bdlib.cells import key_of, lab_of, load

    here = ("built in", "cached", "on disk")
    unread = {s["name"]: f"{s['name']} is not on this machine" for s in data.status() if s["state"] not in here}
    for cell in cells:
        lab = lab_of(cell, device=device, verify=verify)
        if cell.dataset not in unread:
            try:
                yield cell, "", load(key_of(cell, lab))
                continue
            except (ValueError, OSError, ImportError) as error:  # the set's files: each try may take a minute
                unread[cell.dataset] = " ".join(str(error).split())
        yield cell, unread[cell.dataset], None


def _list(found: Iterator[tuple[Any, str, dict[str, Any] | None]]) -> dict[str, Any]:
    rows, count = {}, {"there": 0, "missing": 0, "failed": 0}
    for cell, reason, record in found:
        state = "missing" if record is None else "failed" if "error" in record else "there"
        count[state] += 1
        why = reason if record is None else " ".join(record.get("error", "").split())
        rows[str(cell)] = f"{state:<8} {cell}{f'  ({why})' if why else ''}"
    sums = ", ".join(f"{n} {state}" for state, n in count.items())
    listed = {name: row.split()[0] for name, row in rows.items()}
    return {"record": {**count, "cells": listed}, "text": "\n".join([*rows.values(), f"{len(rows)} cells: {sums}"])}


def _run(name: str, cells: Sequence[Any], device: str, args: argparse.Namespace) -> dict[str, Any]:
    from tqdm.auto import tqdm

    from bdlib import files, report
    from bdlib.cells import make

    engine = None
    if args.engine == "dask":
        if find_spec("distributed") is None:
            raise ImportError('--engine dask needs dask.distributed: pip install "bdlib[cluster]"')
        from bdlib.cluster import spread

        workers = 2 if args.workers is None else args.workers
        engine = spread(args.scheduler, workers=workers, device=device, verify=args.verify)
    rows = sys.stderr if args.json else sys.stdout  # with --json nothing but JSON goes to stdout

    def show(text: str) -> None:
        tqdm.write(text, file=rows)
        rows.flush()

    show(report.header())
    records = make(cells, device=device, verify=args.verify, engine=engine, show=lambda _, r: show(report.line(r)))
    failed = [report.name(r) for r in records if "error" in r]
    paths = report.write(records, args.output or files.store_folder() / "bench" / "reports" / name)
    page = next(p for p in paths if p.suffix == ".md")
    again = "; the next call tries them again" if failed else ""
    text = f"{len(records)} cells, {len(failed)} failed{again}\nreport: {page}"
    result = {"cells": len(records), "failed": failed, "report": [str(p) for p in paths], "records": records}
    return {"record": result, "text": text, "status": int(bool(failed))}


def _there(cells: Sequence[Any], device: str, verify: bool) -> tuple[list[dict[str, Any]], int]:
    """The records that are there, failed ones among them, and the number of those missing."""
    found = [record for _, _, record in _status(cells, device, verify)]
    there = [r for r in found if r is not None]
    if not any("error" not in r for r in there):
        raise ValueError(f"none of the {len(cells)} cells is there; run them first (bench with the same options)")
    return there, len(found) - len(there)


def _export(name: str, cells: Sequence[Any], device: str, args: argparse.Namespace) -> dict[str, Any]:
    from bdlib import report

    there, missing = _there(cells, device, args.verify)
    path = args.output or RESULTS.parent / "full" / f"{name}.jsonl"
    failed = report.export(there, path)
    written = len(there) - failed
    text = f"{written} records written to {path}; left out: {missing} missing, {failed} failed"
    return {"record": {"file": str(path), "written": written, "missing": missing, "failed": failed}, "text": text}


def _compare(name: str, cells: Sequence[Any], device: str, args: argparse.Namespace) -> dict[str, Any]:
    from bdlib import published

    there, missing = _there(cells, device, args.verify)
    known = json.loads((RESULTS.parent / "published.json").read_text(encoding="utf-8"))
    rows = published.compare(there, known)
    left = f"\n{missing} cells are missing" if missing else ""
    return {"record": rows, "text": published.beside(rows) + left}


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from bdlib import files, speed

    if args.what == "speed":
        result = speed.measure(args.device)
        path = args.output or files.store_folder() / "bench" / "speed.json"
        files.write_bytes(path, f"{json.dumps(result, indent=1)}\n".encode())
        return {"record": result, "text": f"{speed.report(result)}\nrecord: {path}"}
    result = speed.poisoning()
    return {"record": result, "text": speed.report_poisoning(result)}


def _records(args: argparse.Namespace) -> dict[str, Any]:
    from bdlib import bench as benchmark
    from bdlib.lab import Lab

    lab = Lab("small", device="cpu")
    if args.what == "gallery":
        from bdlib import gallery

        made = 0 if args.list else gallery.make(lab)
        stale = list(gallery.missing(lab))
        text = f"gallery: {made} sheets made, missing or stale: {', '.join(stale) or 'none'}"
        return {"record": {"made": made, "missing": stale}, "text": text}
    failed = 0 if args.list else benchmark.make(lab, only=args.only)
    rows: dict[str, list[int]] = {}
    for cell, _, record in benchmark.status(lab, only=args.only):
        there = rows.setdefault(cell.experiment, [0, 0])
        there[record is None] += 1
    if failed:
        raise RuntimeError(f"{failed} cells failed; their records carry the error, the next call tries them again")
    width = max(map(len, rows), default=0)
    lines = [f"  {k:<{width}}  {there} there, {missing} missing or stale" for k, (there, missing) in rows.items()]
    return {"record": rows, "text": "\n".join(["records", *lines])}
