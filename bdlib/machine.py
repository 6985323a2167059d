"""What this machine has: a device that is there, and the most memory that was in use."""

import os
import platform

import torch


def device_of(wanted: str = "") -> str:
    """`wanted`, by default `BDLIB_DEVICE`, else the GPU if there is one.

    Raises:
        ValueError: a GPU was asked for and there is none; says what was found.
    """
    device = wanted or os.environ.get("BDLIB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(f"device {device!r} was asked for; torch {torch.__version__} ({built}) finds no GPU here")
    return device


def peak_bytes(device: str) -> int | None:
    """Most memory in use: of a GPU since `torch.cuda.reset_peak_memory_stats`, else of this process since it began.

    None where the system does not say (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
