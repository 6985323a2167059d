"""A device that is not the processor, for machines without a GPU: memory and kernels of the CPU, rules of a GPU.

    BDLIB_PRETEND=1 pytest tests                            # the device tests once more, on "pretend"
    python tests/pretend.py notebooks/05-npd.ipynb ...      # do these chapters run on a device at all?

Tensors on "pretend" refuse to be mixed with tensors of the CPU, to be handed to NumPy, and random numbers from a CPU
generator; else every operation runs the CPU's kernel on the same memory, so results equal the CPU's. It finds what a
GPU would: a factory without `device=`, a missing `.cpu()`. It has no streams, no bfloat16 and no limits of memory.
Needs a C++ compiler and ninja, 20 seconds once; PyTorch keeps what was built in its folder of extensions.
"""

import os
import sys
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load() -> str:
    """Build the device if need be, register it with PyTorch, and return its name."""
    import torch
    from torch.utils.cpp_extension import load as build

    name = "pretend"
    if hasattr(torch, name):
        return name
    build("bdlib_pretend", [str(HERE / "pretend.cpp")], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(name)
    module = types.ModuleType(f"torch.{name}")
    for asked, answer in {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False,
        "manual_seed_all": None, "get_amp_supported_dtype": [torch.bfloat16],
    }.items():  # fmt: skip
        setattr(module, asked, lambda *_, answer=answer: answer)
    torch._register_device_module(name, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return name


def main() -> int:
    """Run notebooks on the device, on their committed code; 0 if no cell failed. They are not written back."""
    import nbformat
    from nbclient import NotebookClient

    sys.path.insert(0, str(HERE.parent / "book" / "tools"))
    from pinned import pin

    pin()  # the claims are those of the committed outputs
    os.environ.update(BDLIB_DEVICE="pretend", BDLIB_STRICT="1", TQDM_DISABLE="1")
    failed = 0
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        lines = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pretend; pretend.load()"
        NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            allow_errors=True,
            extra_arguments=["--log-level=40", f"--IPKernelApp.exec_lines={lines}"],
            resources={"metadata": {"path": str(path.resolve().parent)}},
        ).execute()
        errors = [
            f"  {cell.id}: {output.ename}: {output.evalue[:200]}"
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.output_type == "error"
        ]
        failed += len(errors)
        print("\n".join([f"{path.name}: {len(errors)} cells failed", *errors]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
