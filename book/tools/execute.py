"""Run the chapters in order, in place, and stamp them.

    python book/tools/execute.py                       # every notebook of the table of contents
    python book/tools/execute.py notebooks/02-anp.ipynb
    python book/tools/execute.py --check               # runs nothing; says whose stamp is old

A stamp hashes what a notebook's outputs depend on: its code cells, the library code that they import, and the records
that they read (declared in the notebook's metadata, ``"bdlib": {"reads": ["book/results/small/anp.json"]}``, paths
from the repository's root, `*` allowed). tests/test_notebooks.py fails when a stamp is old.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pinned import pin

ROOT = Path(__file__).resolve().parents[2]
SECONDS = ROOT / "book" / "results" / "notebook_seconds.json"
# tqdm's notebook bar does not read TQDM_DISABLE, and one that is gone leaves an empty box on the page
NO_BARS = (
    "import functools, tqdm.notebook as t; "
    "t.tqdm_notebook.__init__ = functools.partialmethod(t.tqdm_notebook.__init__, disable=True); del functools, t"
)
MODEL_ID = re.compile(r'(?<=")[0-9a-f]{32}(?=")|(?<=IPY_MODEL_)[0-9a-f]{32}')


def main() -> int:
    """Run or check the chapters; 0 if all went well."""
    pin()
    parser = argparse.ArgumentParser(description="Run the chapters in order, in place, and stamp them.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="only these; default: all of book/_toc.yml, in order")
    parser.add_argument("--check", action="store_true", help="run nothing, list the notebooks whose stamp is old")
    parser.add_argument("--timeout", type=int, default=900, help="seconds allowed for one cell")
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.notebooks] or chapters()
    if arguments.check:
        old = [path.name for path in paths if not current(path)]
        print(f"execute: old stamps: {', '.join(old)}" if old else f"execute: {len(paths)} stamps are current")
        return 1 if old else 0
    failed = []
    for path in paths:
        try:
            execute(path, timeout=arguments.timeout)
        except Exception as error:  # a chapter that fails must not keep the others from running
            failed.append(path.name)
            print(f"execute: {path.name} FAILED\n{error}", file=sys.stderr)
    if failed:
        print(f"execute: failed, left as they were: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def chapters() -> list[Path]:
    """The notebooks of book/_toc.yml, in the book's order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [path for path in (ROOT / f"{file}.ipynb" for file in files) if path.is_file()]


def execute(path: Path, *, timeout: int = 900) -> None:
    """Run one notebook at the small scale and write it back with its outputs, widget state and stamp.

    If the run had to train victims, the notebook runs a second time, because the seconds that a chapter states are
    those of a reader whose store already has them; both times go on record.
    """
    first = None
    print(f"execute: {path.name} ...", flush=True)
    notebook, seconds, trained = run(path, timeout)
    if trained:
        first = seconds
        notebook, seconds, _ = run(path, timeout)
    tidy(notebook)
    notebook.metadata.setdefault("bdlib", {})["stamp"] = stamp(path)
    part = path.with_name(f".{path.name}.part")
    nbformat.write(notebook, part)
    part.replace(path)
    note_seconds(path.stem, seconds, first)
    print(f"execute: {path.name} took {seconds:.0f} s" + (f", {first:.0f} s with training" if first else ""))


def run(path: Path, timeout: int) -> tuple[nbformat.NotebookNode, float, bool]:
    """Run a notebook on a fresh kernel: the executed notebook, its seconds, whether the store gained a file."""
    from nbclient import NotebookClient

    os.environ.update(TQDM_DISABLE="1", BDLIB_SCALE="small", PYTHONHASHSEED="0", BDLIB_STRICT="1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=True,
        record_timing=False,
        extra_arguments=[
            "--log-level=40",  # ipykernel warns about TCP at each start
            f"--IPKernelApp.exec_lines={NO_BARS}",
        ],
        resources={"metadata": {"path": str(path.parent)}},
    )
    before, start = stored(), time.perf_counter()
    client.execute()
    return notebook, time.perf_counter() - start, bool(stored() - before)


def stored() -> set[str]:
    """The victims in the store, each with the time at which it was written."""
    from bdlib import files

    return {f"{file} {file.stat().st_mtime_ns}" for file in (files.store_folder() / "victims").glob("*.safetensors")}


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what changes from run to run without meaning anything, so that a diff shows what changed."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = notebook.metadata.get("language_info", {})
    notebook.metadata["language_info"] = {
        k: language[k] for k in ("file_extension", "mimetype", "name") if k in language
    }
    # widget models are named by random numbers: rename them in the order in which the cells show them
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    widgets = json.dumps(notebook.metadata.get("widgets", {}))
    names: dict[str, str] = {}
    for match in MODEL_ID.finditer(outputs + widgets):
        names.setdefault(match[0], hashlib.md5(f"widget {len(names)}".encode()).hexdigest())

    def renamed(text: str) -> Any:
        return json.loads(MODEL_ID.sub(lambda match: names[match[0]], text))

    for cell, output in zip(notebook.cells, renamed(outputs), strict=True):
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(item) for item in output]
    if "widgets" in notebook.metadata:
        notebook.metadata["widgets"] = nbformat.from_dict(renamed(widgets))
        for views in notebook.metadata["widgets"].values():
            views["state"] = dict(sorted(views["state"].items()))
    notebook.nbformat, notebook.nbformat_minor = 4, 5


def note_seconds(name: str, seconds: float, first: float | None) -> None:
    """Write a chapter's seconds into book/results/notebook_seconds.json."""
    from bdlib.provenance import run_info

    record = json.loads(SECONDS.read_text()) if SECONDS.is_file() else {"notebooks": {}}
    entry = record["notebooks"].setdefault(name, {})
    entry["seconds"] = round(seconds, 1)
    if first is not None:
        entry["seconds_with_training"] = round(first, 1)
    entry["run"] = {**run_info("cpu"), "cores": os.cpu_count()}
    record["what"] = "wall seconds of one run of each chapter with its victims in the store; with_training: without"
    SECONDS.parent.mkdir(parents=True, exist_ok=True)
    SECONDS.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def stamp(path: Path) -> str:
    """Hash of all that a notebook's outputs depend on: its code, the library it imports, the records it reads.

    Raises:
        ValueError: the notebook declares a record that does not exist.
    """
    from bdlib.provenance import fingerprint

    notebook = nbformat.read(path, as_version=4)
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    modules = library_modules(notebook)
    digest.update((fingerprint(*modules) if modules else "").encode())
    for record in reads(notebook):
        digest.update(f"{record.relative_to(ROOT).as_posix()}\0".encode() + record.read_bytes())
    return digest.hexdigest()[:16]


def current(path: Path) -> bool:
    """Whether a notebook's stamp is the one its present content asks for."""
    return nbformat.read(path, as_version=4).metadata.get("bdlib", {}).get("stamp") == stamp(path)


def reads(notebook: nbformat.NotebookNode) -> list[Path]:
    """The record files that the notebook declares."""
    found: list[Path] = []
    for pattern in notebook.metadata.get("bdlib", {}).get("reads", []):
        files = sorted(ROOT.glob(pattern))
        if not files:
            raise ValueError(f"the notebook reads {pattern}, which does not exist: run make records")
        found += files
    return found


def library_modules(notebook: nbformat.NotebookNode) -> list[str]:
    """The modules of bdlib that the notebook's code names, sorted."""
    tree = code(notebook)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if all(map(is_module, names)) else names | {node.module}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
    return sorted(filter(is_module, found))


def code(notebook: nbformat.NotebookNode) -> ast.Module:
    """The syntax tree of all code cells, without IPython's magics."""
    lines = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.source.startswith("%%"):
            lines += [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return ast.parse("\n".join(lines))


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, or "" where the expression is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of bdlib."""
    if name.split(".")[0] != "bdlib":
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
