"""Every built page in a real browser, opened as a file: quiet, self-contained, its widgets moving without a kernel."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.book, pytest.mark.browser]
WIDGETS = 'script[type="application/vnd.jupyter.widget-view+json"]'
PATIENCE = 120_000  # milliseconds; a page takes two seconds on idle cores
# what a reader sees of a widget output, apart from the controls themselves
SHOWN = """panel => [...panel.querySelectorAll('*')].filter(e => e.offsetParent !== null
    && !e.closest('.widget-readout, .widget-slider, select, button'))
    .map(e => e.tagName === 'IMG' ? e.src : e.tagName === 'CANVAS' ? e.toDataURL()
              : [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('')
                + (e.matches('[role=progressbar], .progress-bar') ? e.getAttribute('style') : '')).join('|')"""


@dataclass
class Opened:
    """A page and what was noticed while it was open."""

    page: object
    name: str
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per page of the table of contents, known before the book is built."""
    if "opened" in metafunc.fixturenames:
        import yaml
        from conftest import ROOT

        toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
        names = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
        metafunc.parametrize("opened", [*names, "search", "genindex"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, book: Path, chromium) -> Iterator[Opened]:
    """One page, open, its widgets drawn and its maths set."""
    name = request.param
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    record = Opened(page, name)

    def guard(route) -> None:
        url = route.request.url
        if url.startswith(("file:", "data:", "blob:", "about:")):
            route.continue_()
        else:
            record.outside.append(url)
            route.abort()

    page.route("**/*", guard)
    page.on("console", lambda message: record.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: record.errors.append(str(error)))
    page.on("requestfailed", lambda failed: record.missing.append(failed.url))
    page.goto((book / f"{name}.html").as_uri(), wait_until="load")
    views = page.locator(WIDGETS).count()
    if views:
        page.wait_for_function(f"document.querySelectorAll('.widget-subarea').length >= {views}", timeout=PATIENCE)
        page.wait_for_function(
            "[...document.querySelectorAll('.widget-subarea')].every(e => e.childElementCount)", timeout=PATIENCE
        )
    page.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 1) : 1")
    page.wait_for_timeout(300)  # what scripts do after the last event
    yield record
    context.close()


def test_quiet_and_self_contained(opened: Opened) -> None:
    assert opened.outside == []
    assert opened.missing == []
    assert opened.errors == []


def test_maths_is_set(opened: Opened) -> None:
    count = opened.page.locator("article .math").count()
    if not count:
        return
    assert opened.page.locator("article mjx-container").count() >= count
    assert opened.page.locator("article mjx-merror, article [data-mjx-error]").count() == 0
    # the fonts came with the book
    assert opened.page.evaluate("[...document.fonts].some(f => f.family.startsWith('MJX') && f.status === 'loaded')")


def test_images_are_there_and_described(opened: Opened) -> None:
    images = opened.page.eval_on_selector_all(
        "article img",
        "all => all.map(i => ({alt: i.getAttribute('alt'), ok: i.complete && i.naturalWidth > 0,"
        " src: i.src.slice(-60), shown: i.offsetParent !== null}))",
    )
    for image in images:
        alt = (image["alt"] or "").strip()
        assert alt, f"no alt text: {image['src']}"
        assert not alt.endswith((".png", ".svg", ".jpg", ".webp")) and "/" not in alt.split()[0], (
            f"a path as alt: {alt}"
        )
        assert image["ok"] or not image["shown"], f"broken image: {image['src']}"


def test_controls_have_names(opened: Opened) -> None:
    nameless = opened.page.eval_on_selector_all(
        ".widget-subarea :is([role=slider], select, input, button)",
        """all => all.filter(e => !(e.getAttribute('aria-label') || e.title || e.textContent.trim()
             && e.tagName === 'BUTTON' || e.labels && [...e.labels].some(l => l.textContent.trim())))
             .map(e => e.outerHTML.slice(0, 200))""",
    )
    assert nameless == []


def test_every_control_moves_something(opened: Opened) -> None:
    page = opened.page
    for panel in page.locator(".widget-subarea").all():
        for handle in panel.locator("[role=slider]:visible").all():
            before = panel.evaluate(SHOWN)
            at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
            handle.focus()
            page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
            assert changed(panel, before), f"slider {handle.get_attribute('aria-label')!r} moves nothing"
        for select in panel.locator("select:visible").all():
            before = panel.evaluate(SHOWN)
            options = select.evaluate("e => e.options.length")
            assert options > 1, "a dropdown with one choice"
            select.select_option(index=(select.evaluate("e => e.selectedIndex") + 1) % options)
            assert changed(panel, before), "a dropdown moves nothing"
        for group in panel.locator(".widget-toggle-buttons:visible").all():
            before = panel.evaluate(SHOWN)
            group.locator("button:not(.mod-active)").first.click()
            assert changed(panel, before), "toggle buttons move nothing"
        for play in panel.locator(".widget-play:visible").all():
            before = panel.evaluate(SHOWN)
            start, stop = play.locator("button").nth(0), play.locator("button").nth(1)
            start.click()
            assert changed(panel, before), "a Play button moves nothing"
            stop.click()
    assert opened.errors == []


def changed(panel, before: str) -> bool:
    """Whether a panel shows something else within ten seconds."""
    for _ in range(200):
        if panel.evaluate(SHOWN) != before:
            return True
        panel.page.wait_for_timeout(50)
    return False


def test_solutions_open(opened: Opened) -> None:
    toggles = opened.page.locator("article .toggle-button:visible, article details > summary:visible")
    for index in range(min(toggles.count(), 3)):
        toggles.nth(index).click()
    assert opened.errors == []


def test_fits_a_phone(opened: Opened) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 800})
    try:
        wide = opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 1, f"{opened.name} is {wide} pixels wider than a phone"
    finally:
        opened.page.set_viewport_size({"width": 1280, "height": 900})
