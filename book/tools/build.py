"""Build the book into _build/html, warnings as errors, once per state of its sources.

python book/tools/build.py             # builds if something changed since the last good build
python book/tools/build.py --force     # builds
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import vendor

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
LOG = ROOT / "_build" / "book.log"
MARK = ROOT / "_build" / "book.sha256"  # of the sources of the last good build
SOURCES = ("_config.yml", "requirements.txt", "book/**/*", "notebooks/*.ipynb", "bdlib/**/*.py")


class BuildError(RuntimeError):
    """The build failed; the message holds the end of its log."""


def main() -> int:
    """Build, and say where to open the book."""
    parser = argparse.ArgumentParser(description="Build the book into _build/html.")
    parser.add_argument("--force", action="store_true", help="build even if nothing changed")
    force = parser.parse_args().force
    try:
        seconds = ensure(force=force)
    except (vendor.Unavailable, ValueError, BuildError) as error:
        print(f"book: {error}", file=sys.stderr)
        return 1
    print(f"book: built in {seconds:.0f} s" if seconds else "book: up to date")
    print(f"book: open {(HTML / 'index.html').as_uri()}")
    return 0


def ensure(*, force: bool = False) -> float:
    """Bring _build/html up to date with the sources; return the seconds it took, 0 if nothing had changed.

    Raises:
        vendor.Unavailable: the vendored JavaScript is missing and npm cannot fetch it.
        BuildError: Jupyter Book failed or warned.
    """
    (ROOT / "_build").mkdir(exist_ok=True)
    with locked(ROOT / "_build" / "book.lock"):
        vendor.ensure()
        state = sources()
        if not force and MARK.is_file() and MARK.read_text() == state and (HTML / "index.html").is_file():
            return 0.0
        MARK.unlink(missing_ok=True)
        # a warning is only given when a page is read: never build on doctrees of an earlier state
        for stale in (ROOT / "_build" / ".doctrees", HTML):
            shutil.rmtree(stale, ignore_errors=True)
        start = time.perf_counter()
        run()
        MARK.write_text(state)
        return max(time.perf_counter() - start, 1e-3)


def run() -> None:
    """Run Jupyter Book with warnings as errors; its output goes to _build/book.log."""
    program = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    command = ["build", ".", "--toc", "book/_toc.yml", "-W", "-n", "--keep-going"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    with LOG.open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    text = LOG.read_text(errors="replace")
    if done.returncode:
        lines = text.splitlines()
        problems = [line for line in lines if "WARNING" in line or "ERROR" in line or "CRITICAL" in line]
        raise BuildError(
            "\n".join([f"Jupyter Book failed, log in {LOG.relative_to(ROOT)}:", *(problems or lines)[-40:]])
        )


def sources() -> str:
    """SHA-256 over the names and contents of everything that the book is built from."""
    digest = hashlib.sha256(sys.version.encode())
    paths = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()})
    for path in paths:
        if "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time build; the others wait and then find it built."""
    with path.open("w") as handle:
        try:
            import fcntl
        except ImportError:  # Windows: tests run in one process there
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
