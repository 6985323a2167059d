"""The arithmetic of the book: set where nothing else is, and seen by what is started in it."""

import os
import subprocess
import sys

import pinned
import pytest
import torch
from conftest import ROOT


def run(code: str, **set_already: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in pinned.PINNED} | set_already
    command = [sys.executable, str(ROOT / "book" / "tools" / "pinned.py"), "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_command_is_run_in_it():
    found = run("import os; print(*(os.environ[n] for n in ('OMP_NUM_THREADS', 'BDLIB_DTYPE', 'ONEDNN_MAX_CPU_ISA')))")
    assert found == "1 float32 AVX2"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no AVX2 here")
def test_a_newer_processor_takes_the_older_instructions():
    assert run("import torch; print(torch.backends.cpu.get_cpu_capability())") == "AVX2"
    assert run("from bdlib.provenance import amp_dtype; print(amp_dtype('cpu'))") == "None"


def test_what_is_set_already_stays():
    assert run("import os; print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="2") == "2"


def test_pinning_changes_only_what_is_missing():
    environment = {"BDLIB_DTYPE": "auto", "HOME": "/"}
    pinned.pin(environment)
    store = {"BDLIB_STORE": "~/.cache/bdlib/pinned"}  # a network trained in other arithmetic is another network
    assert environment == {**pinned.PINNED, **store, "BDLIB_DTYPE": "auto", "HOME": "/"}
    mine = {"BDLIB_STORE": "/mine", "XDG_CACHE_HOME": "/cache"}
    pinned.pin(mine)
    assert mine["BDLIB_STORE"] == "/mine"


def test_a_failure_is_handed_on():
    command = [sys.executable, str(ROOT / "book" / "tools" / "pinned.py"), "-c", "raise SystemExit(3)"]
    assert subprocess.run(command).returncode == 3
