"""The built book: it builds without a warning, its links lead somewhere, and it asks for nothing outside its folder."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import bookext
import pytest
import vendor
from bs4 import BeautifulSoup
from conftest import ROOT

pytestmark = pytest.mark.book
LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}
NOT_LOADED = {"canonical", "author", "license", "next", "prev", "search", "index"}  # of <link rel=...>


@pytest.fixture(scope="module")
def soups(pages: list[Path]) -> dict[Path, BeautifulSoup]:
    return {page.resolve(): BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages}


def test_builds_without_warnings(build_problem: str) -> None:
    import build

    assert not build_problem, build_problem
    log = build.LOG.read_text(errors="replace")
    assert "build succeeded." in log
    assert not re.findall(r"^.*(?:WARNING|ERROR|CRITICAL):.*$", log, re.MULTILINE)


def test_every_page_of_the_contents_is_built(book: Path) -> None:
    import yaml

    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    names = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    assert [name for name in names if not (book / f"{name}.html").is_file()] == []


def test_nothing_outside_is_loaded(book: Path, soups: dict[Path, BeautifulSoup]) -> None:
    outside = []
    for page, soup in soups.items():
        for tag, attribute in LOADED.items():
            for element in soup.find_all(tag):
                address = element.get(attribute, "")
                if tag == "link" and set(element.get("rel", [])) <= NOT_LOADED:
                    continue
                if urlsplit(address).scheme not in ("", "data") or address.startswith("//"):
                    outside.append(f"{page.name}: <{tag}> {address}")
        styles = [
            *(style.get_text() for style in soup.find_all("style")),
            *(e["style"] for e in soup.select("[style]")),
        ]
        outside += [
            f"{page.name}: {url}" for style in styles for url in re.findall(r"url\(['\"]?(?:https?:)?//.*?\)", style)
        ]
    for sheet in book.glob("_static/**/*.css"):
        found = re.findall(r"@import[^;]*//[^;]*;|url\(['\"]?(?:https?:)?//[^)]*\)", sheet.read_text(errors="replace"))
        outside += [f"{sheet.name}: {url}" for url in found]
    assert outside == []


def test_links_and_anchors_resolve(book: Path, soups: dict[Path, BeautifulSoup]) -> None:
    anchors = {page: {e["id"] for e in soup.select("[id]")} for page, soup in soups.items()}
    broken = []
    for page, soup in soups.items():
        for link in soup.select("a[href], img[src], script[src], link[href]"):
            address = urlsplit(link.get("href") or link.get("src") or "")
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.exists():
                broken.append(f"{page.name}: {address.geturl()}")
            elif link.name == "a" and address.fragment and unquote(address.fragment) not in anchors.get(target, ()):
                if target in anchors:
                    broken.append(f"{page.name}: {address.geturl()} (no such anchor)")
    assert broken == []


def test_pages_say_their_language_and_title(soups: dict[Path, BeautifulSoup]) -> None:
    for page, soup in soups.items():
        assert soup.html is not None and soup.html.get("lang") == "en", page.name
        assert soup.title is not None and soup.title.get_text().strip(), page.name


def test_no_markup_is_left_over(soups: dict[Path, BeautifulSoup]) -> None:
    # a role or directive that nothing rendered, a citation or a reference that stayed a question mark
    left = re.compile(r"\{(?:cite|ref|numref|eq|term|glue|doc|seconds|reading|prf)[:\w]*\}`|:::|```|\[\?\]|\?\?")
    found = []
    for page, soup in soups.items():
        article = soup.select_one("article") or soup
        for element in article.select("pre, code, script, style, .math, .docutils.literal"):
            element.extract()
        found += [f"{page.name}: {match[0]}" for match in left.finditer(article.get_text())]
    assert found == []


class TestVendor:
    """The fetcher of the vendored files."""

    def test_damage_is_found(self, tmp_path: Path) -> None:
        name, digest = next(iter(vendor.wanted().items()))
        assert not vendor.intact(tmp_path / name, digest)  # missing
        (tmp_path / name).write_bytes(b"damaged")
        assert not vendor.intact(tmp_path / name, digest)

    def test_a_damaged_file_is_fetched_again(self, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in vendor.wanted():
            vendor.write(tmp_path / name, (vendor.FOLDER / name).read_bytes())
        (tmp_path / "require.js").write_bytes(b"damaged")
        asked = []

        def fetch(package: str, files: dict[str, tuple[str, str]], folder: Path) -> None:
            asked.append(package)
            vendor.write(folder / "require.js", (vendor.FOLDER / "require.js").read_bytes())

        monkeypatch.setattr(vendor, "fetch", fetch)
        assert vendor.ensure(tmp_path) == 1
        assert vendor.ensure(tmp_path) == 0
        assert asked == ["requirejs@2.3.7"]

    def test_no_network_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
        with pytest.raises(vendor.Unavailable, match="npm cannot fetch requirejs") as caught:
            vendor.ensure(tmp_path)
        assert "\n" not in str(caught.value)

    def test_an_altered_download_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import tarfile

        (tmp_path / "require.js").write_bytes(b"altered")
        archive = tmp_path / "p.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "require.js", "package/require.js")
        monkeypatch.setattr(vendor, "pack", lambda package, scratch: archive)
        with pytest.raises(ValueError, match="refused"):
            vendor.ensure(tmp_path / "out")
        assert not (tmp_path / "out" / "require.js").exists()


def test_reading_time_counts_prose_and_shown_code() -> None:
    def cell(kind: str, source: str, **metadata: list[str]) -> dict:
        return {"cell_type": kind, "source": source, "metadata": metadata}

    prose, code = cell("markdown", "word " * 2000), cell("code", "x = 1\n\n" * 40)
    hidden = cell("code", "x = 1\n" * 1000, tags=["remove-cell"])
    assert bookext.reading_minutes({"cells": [prose]}) == 10
    folded = [cell("code", "x = 1\n" * 1000, tags=[tag]) for tag in ("hide-input", "hide-cell")]
    assert bookext.reading_minutes({"cells": [prose, code, hidden, *folded]}) == 15  # 10 + 4, to the next five
