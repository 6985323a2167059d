"""What code, data and machine a number came from.

fingerprint("bdlib.defenses.anp")     # changes when ANP, or anything of bdlib it imports, changes its meaning
run_info("cuda")                      # device, versions, commit and date, as every record carries them
"""

import ast
import datetime
import hashlib
import importlib.util
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = __name__.split(".")[0]


def _source(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(tree: ast.AST, name: str, is_package: bool) -> set[str]:
    """Modules of this package that `tree` (the source of module `name`) imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative import: climb from the package that holds the module
                parts = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            found |= {base} | {f"{base}.{a.name}" for a in node.names}  # `from . import x` may name a module
    return {m for m in found if m.split(".")[0] == PACKAGE and m != PACKAGE}


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return tree


def _dump(node: object) -> str:
    # like ast.dump, but the same under every Python version: fields that are empty or None are left out, so that
    # one version's new field (type_params since 3.12) or new format changes nothing
    if isinstance(node, ast.Constant):
        return f"Constant({node.value!r})"
    if isinstance(node, ast.AST):
        inner = ",".join(f"{f}={_dump(v)}" for f in node._fields if (v := getattr(node, f, None)) not in (None, []))
        return f"{type(node).__name__}({inner})"
    return f"[{','.join(map(_dump, node))}]" if isinstance(node, list) else repr(node)


@lru_cache
def _parsed(path: Path, mtime: int) -> tuple[str, ast.AST]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return _dump(_without_docstrings(tree)), tree


def closure(*modules: str | ModuleType) -> dict[str, Path]:
    """Every module of this package that `modules` import, directly or not, with its file."""
    todo = [m if isinstance(m, str) else m.__name__ for m in modules]
    seen: dict[str, Path] = {}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        try:
            path = _source(name)
        except ModuleNotFoundError:  # `from .x import function` was tried as a module
            path = None
        if path is None:
            continue
        seen[name] = path
        _, tree = _parsed(path, path.stat().st_mtime_ns)
        todo += sorted(_imports(tree, name, path.name == "__init__.py"))
    return dict(sorted(seen.items()))


def fingerprint(*modules: str | ModuleType) -> str:
    """Hash of what the code of `modules` and of all it imports from this package means.

    Comments, docstrings and layout do not count: the hash is taken over syntax trees.

    Args:
        modules: dotted names or modules of this package.

    Returns:
        16 hex digits.

    Raises:
        ValueError: a name that is not a module.
    """
    found = closure(*modules)
    for m in modules:
        if (name := m if isinstance(m, str) else m.__name__) not in found:
            raise ValueError(f"{name!r} is not a module with a Python source file")
    h = hashlib.sha256()
    for name, path in found.items():
        h.update(f"{name}\n{_parsed(path, path.stat().st_mtime_ns)[0]}\n".encode())
    return h.hexdigest()[:16]


def commit() -> str:
    """The commit of the source tree, from `BDLIB_COMMIT` or git; "+" marks uncommitted changes in the library."""
    if given := os.environ.get("BDLIB_COMMIT"):
        return given
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def amp_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 where the processor computes it natively, else None (float32).

    Decided by what the processor can do, never by a stopwatch, so that two runs on one machine agree. The environment
    variable BDLIB_DTYPE=float32 wants float32 everywhere, as the book's small records and outputs were made.

    Raises:
        ValueError: a BDLIB_DTYPE other than auto, the default, or float32.
    """
    wanted = os.environ.get("BDLIB_DTYPE", "auto")
    if wanted not in ("auto", "float32"):
        raise ValueError(f"BDLIB_DTYPE must be auto or float32, got {wanted!r}")
    device = torch.device(device)
    if wanted == "float32":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        has = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, f, lambda: False)() for f in has) else None
    return None


def run_info(device: torch.device | str = "cpu") -> dict[str, str]:
    """Device, number type, versions, commit and date of this run, as text."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    dtype = amp_dtype(device)
    return {
        "device": name,
        "dtype": "bfloat16" if dtype is torch.bfloat16 else "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    kind = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                kind = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{kind}, {torch.get_num_threads()} threads"
