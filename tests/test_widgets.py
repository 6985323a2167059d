"""Explorers: what they refuse, how they are wired, and that a browser without a kernel moves them."""

import json
from pathlib import Path

import ipywidgets
import pytest
import torch
from conftest import ROOT, missing
from ipywidgets.embed import dependency_state, embed_data

from bdlib import plots, widgets


def frames(n: int, start: int = 0) -> list[bytes]:
    return [plots.png(torch.full((3, 4, 4), (start + i) / 40)) for i in range(n)]


def alts(n: int, what: str = "square") -> list[str]:
    return [f"{what} {i}" for i in range(n)]


def below(widget: ipywidgets.Widget, kind: type) -> list:
    found = [widget] if isinstance(widget, kind) else []
    return found + [w for child in getattr(widget, "children", ()) for w in below(child, kind)]


def wiring(widget: ipywidgets.Widget) -> list[tuple]:
    """Every browser link below a widget: (control, its trait, what it moves, the trait)."""
    state = dependency_state(widget)
    links = [s["state"] for s in state.values() if s["model_name"] == "LinkModel"]
    by_id = {f"IPY_MODEL_{w.model_id}": w for w in below(widget, ipywidgets.Widget)}
    return [(by_id[s["source"][0]], s["source"][1], by_id[s["target"][0]], s["target"][1]) for s in links]


def test_explorer_links_the_slider_to_the_frames() -> None:
    for values in (None, [0.0, 0.25, 0.5]):
        w = widgets.explorer(frames(3), "threshold", alts(3), values=values, value=1, captions=["a", "b", "c & d"])
        ((control, trait, stack, moved),) = wiring(w)
        assert isinstance(stack, ipywidgets.Stack) and moved == "selected_index" and stack.selected_index == 1
        assert trait == ("value" if values is None else "index") and getattr(control, trait) == 1
        assert control.description == "threshold"
        shown = [child.value for child in stack.children]
        assert [f'alt="square {i}"' in text for i, text in enumerate(shown)] == [True] * 3
        assert "<figcaption" in shown[2] and "c &amp; d" in shown[2] and "data:image/png;base64," in shown[2]
        # only traits that live in the browser are linked
        assert trait in control.keys and "selected_index" in stack.keys


def test_choices_and_linked_and_two_way() -> None:
    menu = widgets.choices(frames(2), ["BadNets", "Blend"], "attack", alts(2), value=1)
    ((control, trait, stack, _),) = wiring(menu)
    assert isinstance(control, ipywidgets.Dropdown) and trait == "index" and stack.selected_index == 1

    views = [widgets.View(frames(3), alts(3)), widgets.View(frames(3, 5), alts(3, "bar"))]
    for kind in (False, True):
        links = wiring(widgets.linked(views, "threshold", values=["low", "mid", "high"], menu=kind))
        assert len(links) == 2 and len({id(link[0]) for link in links}) == 1

    table = [frames(4, 4 * i) for i in range(3)]
    w = widgets.two_way(table, ("sign", "place"), [alts(4, f"sign {i}, place") for i in range(3)], value=(2, 1))
    links = wiring(w)
    rows, columns = below(w, ipywidgets.IntSlider)
    assert sorted(control.description for control, *_ in links) == ["place", "place", "place", "sign"]
    (outer,) = [stack for control, _, stack, _ in links if control is rows]
    assert outer.selected_index == 2 and all(inner.selected_index == 1 for inner in outer.children)
    assert {id(stack) for control, _, stack, _ in links if control is columns} == {id(s) for s in outer.children}


def test_alt_text_cannot_break_out() -> None:
    w = widgets.explorer(frames(1), "x", ['a "quoted" <b> & co'])
    (frame,) = below(w, ipywidgets.HTML)
    assert 'alt="a &quot;quoted&quot; &lt;b&gt; &amp; co"' in frame.value


def test_weight_counts_what_the_page_carries() -> None:
    w = widgets.two_way([frames(2), frames(2)], ("a", "b"), [alts(2), alts(2)])
    assert widgets.weight(w) == sum(len(f.value) for f in below(w, ipywidgets.HTML))
    assert widgets.weight(w) > sum(len(f) for f in frames(2)) * 2 * 4 / 3
    # shared layout and style: a frame costs its picture, not a model each
    state = dependency_state(widgets.explorer(frames(30), "t", alts(30)))
    assert sum(s["model_name"] in ("LayoutModel", "HTMLStyleModel") for s in state.values()) < 8


NOISE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: widgets.explorer([], "t", []), "at least one frame"),
        (lambda: widgets.explorer(frames(3), "t", alts(2)), "alts must have 3 entries, one per frame, got 2"),
        (lambda: widgets.explorer(frames(3), "t", "abc"), "alts must have 3 entries, one per frame, got one string"),
        (lambda: widgets.explorer(frames(2), "t", ["a", " "]), "frame 1 has no alt text"),
        (lambda: widgets.explorer(frames(2), "t", alts(2), captions=["a"]), "captions must have 2 entries"),
        (lambda: widgets.explorer(frames(2), " ", alts(2)), "a control needs a label"),
        (lambda: widgets.explorer(frames(2), "t", alts(2), value=2), r"index in \[0, 1\], got 2"),
        (lambda: widgets.explorer(frames(2), "t", alts(2), values=[1]), "values must have 2 entries"),
        (lambda: widgets.explorer([*frames(1), b"GIF?"], "t", alts(2)), "frame 1 is not a PNG"),
        (
            lambda: widgets.explorer([*frames(1), plots.png(NOISE, colors=256, width=256)], "t", alts(2)),
            r"frame 1 has \d+ bytes, the limit is 8192",
        ),
        (lambda: widgets.choices(frames(2), ["one"], "t", alts(2)), "a menu needs 2 options, one per frame, got 1"),
        (
            lambda: widgets.linked([widgets.View(frames(2), alts(2)), widgets.View(frames(3), alts(3))], "t"),
            r"same number of frames, got \[2, 3\]",
        ),
        (lambda: widgets.linked([], "t"), r"same number of frames, got \[\]"),
        (lambda: widgets.two_way([frames(2), frames(1)], ("a", "b"), [alts(2), alts(1)]), r"got rows of \[2, 1\]"),
        (lambda: widgets.two_way([frames(2)] * 2, ("a", "b"), [alts(2)]), "alts must have 2 rows"),
        (lambda: widgets.two_way([frames(2)] * 2, ("a", "b"), [alts(2), alts(1)]), "row 1: alts must have 2"),
        (lambda: widgets.predict("How many?", {"5": "yes"}), "at least two guesses, got 1"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_predict_is_plain_html_and_the_same_in_every_run() -> None:
    made = widgets.predict("How many of 224 < 300?", {"about 5": "Yes.", "all": "No."}, result="It was 9.").data
    assert made == widgets.predict("How many of 224 < 300?", {"about 5": "Yes.", "all": "No."}, result="It was 9.").data
    assert made.count("<details name=") == 2 and made.count("It was 9.") == 2 and "224 &lt; 300" in made
    assert "<script" not in made and " open" not in made


PAGE = """<!doctype html><meta charset="utf-8"><title>explorers</title>
<script src="{require}"></script>
<script type="application/vnd.jupyter.widget-state+json">{state}</script>
<body>{views}<script src="{embed}"></script></body>"""


@pytest.mark.browser
def test_a_browser_without_a_kernel_moves_every_explorer(chromium, tmp_path: Path) -> None:
    vendor = ROOT / "book" / "_static" / "vendor"
    if not (vendor / "embed-amd.js").is_file():
        missing("book", "the widget manager is not fetched yet: make book")
    made = [
        widgets.explorer(frames(3), "threshold", alts(3, "curve"), values=[0.0, 0.1, 0.2], value=1),
        widgets.linked([widgets.View(frames(3), alts(3, "bar")), widgets.View(frames(3), alts(3, "sign"))], "both"),
        widgets.two_way([frames(2)] * 3, ("row", "column"), [alts(2, f"row {i}, column") for i in range(3)]),
        widgets.choices(frames(2), ["BadNets", "Blend"], "attack", alts(2, "attack")),
    ]
    data = embed_data(views=made)
    view = '<script type="application/vnd.jupyter.widget-view+json">{}</script>'
    page = tmp_path / "page.html"
    page.write_text(
        PAGE.format(
            require=(vendor / "require.js").as_uri(),
            embed=(vendor / "embed-amd.js").as_uri(),
            state=json.dumps(data["manager_state"]),
            views="\n".join(view.format(json.dumps(spec)) for spec in data["view_specs"]),
        )
    )
    tab = chromium.new_page()
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.querySelectorAll('select, [role=slider]').length == 5")

    def seen() -> list[str]:
        # what is laid out, not what is in the tree: a Stack hides the frames that are not chosen
        return tab.eval_on_selector_all(
            "figure img", "all => all.filter(i => i.getClientRects().length).map(i => i.alt)"
        )

    def press(slider: int, key: str) -> None:
        tab.locator("[role=slider]").nth(slider).focus()
        tab.keyboard.press(key)

    def becomes(expected: list[str]) -> None:
        script = (
            "want => JSON.stringify([...document.querySelectorAll('figure img')]"
            ".filter(i => i.getClientRects().length).map(i => i.alt)) == want"
        )
        try:
            tab.wait_for_function(script, arg=json.dumps(expected, separators=(",", ":")), timeout=10_000)
        except Exception:  # the comparison says more than a timeout does
            assert seen() == expected

    becomes(["curve 1", "bar 0", "sign 0", "row 0, column 0", "attack 0"])
    press(0, "ArrowRight")
    becomes(["curve 2", "bar 0", "sign 0", "row 0, column 0", "attack 0"])
    press(1, "ArrowRight")
    becomes(["curve 2", "bar 1", "sign 1", "row 0, column 0", "attack 0"])
    press(3, "ArrowRight")
    press(2, "ArrowRight")
    becomes(["curve 2", "bar 1", "sign 1", "row 1, column 1", "attack 0"])
    press(2, "ArrowRight")
    becomes(["curve 2", "bar 1", "sign 1", "row 2, column 1", "attack 0"])
    tab.locator("select").select_option(index=1)
    becomes(["curve 2", "bar 1", "sign 1", "row 2, column 1", "attack 1"])
    assert problems == []
    tab.close()
