"""Run every check of the repository, all of them even if one fails, and sum up.

    python book/tools/check.py                  # what `make test` runs
    python book/tools/check.py lint notebooks   # only these stages

The stages share one empty temporary store, so a victim is trained once in the whole run, or twice where two chapters
ask for it at the same time. The book comes before
the unit tests because building it fetches the widget manager that one of them opens in a browser.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pinned import pin

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs"]
TWO = ["-n", "2", "--dist", "loadfile"]  # two processes of one thread each; a notebook runs in one of them
BOOK_TESTS = ["tests/test_book.py", "tests/test_browser.py"]
STAGES: dict[str, list[list[str]]] = {
    "lint": [
        [sys.executable, "-m", "ruff", "format", "--check", "--quiet", "bdlib", "tests", "book/tools"],
        [sys.executable, "-m", "ruff", "check", "--quiet", "bdlib", "tests", "book/tools", "notebooks"],
        [sys.executable, "-m", "mypy", "--no-error-summary"],
    ],
    "book": [[*PYTEST, *BOOK_TESTS]],
    "unit": [[*PYTEST, *TWO, "tests", *(f"--ignore={path}" for path in BOOK_TESTS)]],
    "notebooks": [[*PYTEST, *TWO, "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "notebooks"]],
}


def main() -> int:
    """Run the stages; 0 if every one passed."""
    parser = argparse.ArgumentParser(description="Run every check of the repository.")
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all")
    chosen = parser.parse_args().stages or list(STAGES)
    if unknown := set(chosen) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    table = []
    with tempfile.TemporaryDirectory(prefix="bdlib-store-") as store:
        environment = {**os.environ, "BDLIB_STORE": store, "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
        environment.setdefault("MPLBACKEND", "agg")
        environment.setdefault("BDLIB_STRICT", "1")  # a claim that fails is an error
        pin(environment)  # the claims are those of the committed outputs
        for stage in chosen:
            print(f"\n== {stage} ==", flush=True)
            start = time.perf_counter()
            results = [run(command, environment) for command in STAGES[stage]]
            table.append((stage, [text for ok, text in results if text or not ok], all(ok for ok, _ in results)))
            table[-1][1].append(f"{time.perf_counter() - start:.0f} s")
    print("\n== sum ==")
    for stage, words, ok in table:
        print(f"{'passed' if ok else 'FAILED'}  {stage:<10} {'; '.join(words)}")
    return 0 if all(ok for _, _, ok in table) else 1


def run(command: list[str], environment: dict[str, str]) -> tuple[bool, str]:
    """Run one command, show its output; return whether it passed, and in a few words how."""
    tool = command[2]  # every stage is python -m tool
    print(f"-- {tool} {' '.join(part for part in command[3:] if not part.startswith('-'))}", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        last = line.strip() or last
    code = process.wait()
    summary = re.sub(r" in [\d.]+s.*", "", last.strip("= ")) if tool == "pytest" else ""
    if code and tool != "pytest":
        summary = f"{' '.join([tool, *(word for word in command[3:4] if word.isalpha())])} failed"
    elif code == 5:
        summary = "pytest found no test"
    return code == 0, summary


if __name__ == "__main__":
    sys.exit(main())
