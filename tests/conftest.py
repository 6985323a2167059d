"""What the tests share: a store of their own, the devices, the built book, and what to do when something is missing."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "tools"))
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests off the user's store, before anything imports bdlib; make hypothesis repeatable."""
    if "BDLIB_STORE" not in os.environ:
        os.environ["BDLIB_STORE"] = tempfile.mkdtemp(prefix="bdlib-store-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["BDLIB_STORE"], ignore_errors=True))
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile("bdlib", deadline=None, derandomize=True, max_examples=30, database=None)
    settings.load_profile("bdlib")


def missing(what: str, reason: str) -> NoReturn:
    """Skip because `what` is not to be had here, or fail where BDLIB_REQUIRE says that it must be."""
    if what in os.environ.get("BDLIB_REQUIRE", "").split(","):
        pytest.fail(f"{reason} (BDLIB_REQUIRE contains {what})", pytrace=False)
    pytest.skip(reason)


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if not _cuda():  # the tolerances are float32's; a GPU has some of its own, for bfloat16
    os.environ.setdefault("BDLIB_DTYPE", "float32")


def _devices() -> list[Any]:
    devices = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not _cuda(), reason="no GPU")])]
    if os.environ.get("BDLIB_PRETEND"):
        import pretend

        devices.append(pretend.load())
    return devices


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, in turn."""
    return request.param


@pytest.fixture(scope="session")
def build_problem() -> str:
    """Build the book unless it is up to date; what went wrong, or ""."""
    try:
        import build
        import jupyter_book  # noqa: F401
        import vendor
    except ImportError as error:
        missing("book", f"the book's tools are not installed: {error}")
    try:
        build.ensure()
    except vendor.Unavailable as error:
        missing("book", str(error))
    except build.BuildError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def book(build_problem: str) -> Path:
    """The folder of the built book. A build that only warned has pages all the same: one test reports it, not all."""
    import build

    if not (build.HTML / "index.html").is_file():
        pytest.fail("the book was not built: see test_builds_without_warnings", pytrace=False)
    return build.HTML


@pytest.fixture(scope="session")
def pages(book: Path) -> list[Path]:
    """The pages of the built book that a reader opens, the redirecting index left out."""
    found = sorted([*book.glob("book/*.html"), *book.glob("notebooks/*.html")])
    assert found, f"no page in {book}"
    return [*found, book / "search.html", book / "genindex.html"]


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A headless Chromium that may reach nothing but files."""
    executable = os.environ.get("BDLIB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not executable:
        missing("browser", "no Chromium: install chromium, or set BDLIB_CHROMIUM to its path")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("browser", "no Playwright: pip install playwright")
    quiet = ["background-networking", "component-update", "sync", "gpu", "default-apps", "extensions"]
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()
