"""The arithmetic in which the book was made: one thread, float32, AVX2 instructions, whatever the processor has.

    python book/tools/pinned.py -m bdlib bench records      # run a Python command in it
    python book/tools/pinned.py -m jupyterlab notebooks     # read the chapters with the book's own digits

Two threads, AVX-512 or bfloat16 add up in another order or round earlier, and training turns that into another network.
Under these settings two kinds of processor gave the same bits. A variable that is set already stays as it is.
"""

import os
import subprocess
import sys
from collections.abc import MutableMapping

PINNED = {
    "OMP_NUM_THREADS": "1",
    "BDLIB_DTYPE": "float32",
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "AVX2",  # matrix products
}


def pin(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set yet, before torch is imported; networks trained otherwise stay in another store."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    for name, value in {**PINNED, "BDLIB_STORE": f"{cache}/bdlib/pinned"}.items():
        environment.setdefault(name, value)


if __name__ == "__main__":
    pin()
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
