"""Explorers that need no kernel: a slider or menu chooses among frames that lie ready in the page.

    frames = [plots.png(plots.curve(records, chosen=t)) for t in thresholds]
    widgets.explorer(frames, "threshold", alts, values=thresholds)

All frames are HTML figures with an alt text, linked in the browser (`jslink`), so a built page moves them from a
folder, with no server behind it. What a frame shows is computed when the notebook runs. A frame is at most 8 KB and a
page carries all of them: `weight` counts the bytes of an explorer.
"""

import base64
import html
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
from IPython.display import HTML

LIMIT = 8192  # bytes of one frame

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True)
class View:
    """The frames of one panel, one for each position of the control.

    Args:
        frames: image files (PNG, WebP, JPEG or GIF) as bytes, each at most 8 KB.
        alts: what each frame shows, in words, one per frame; "" is refused.
        captions: text under each frame; None leaves it out.

    Raises:
        ValueError: no frame, one that is too large or no image, or alts and captions that do not match.
    """

    frames: Sequence[bytes]
    alts: Sequence[str]
    captions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("an explorer needs at least one frame, got none")
        for name, texts in (("alts", self.alts), ("captions", self.captions)):
            if isinstance(texts, str) or (texts is not None and len(texts) != len(self.frames)):
                got = "one string" if isinstance(texts, str) else f"{len(texts)}"
                raise ValueError(f"{name} must have {len(self.frames)} entries, one per frame, got {got}")
        for i, (frame, alt) in enumerate(zip(self.frames, self.alts, strict=True)):
            if len(frame) > LIMIT:
                raise ValueError(
                    f"frame {i} has {len(frame)} bytes, the limit is {LIMIT}: draw it narrower or with fewer colours "
                    "(plots.png takes both)"
                )
            if _kind(frame) is None:
                raise ValueError(f"frame {i} is not a PNG, WebP, JPEG or GIF file: it begins with {bytes(frame[:4])!r}")
            if not alt.strip():
                raise ValueError(f"frame {i} has no alt text: say in words what it shows")


def explorer(
    frames: Sequence[bytes],
    label: str,
    alts: Sequence[str],
    *,
    captions: Sequence[str] | None = None,
    values: Sequence[Any] | None = None,
    value: int = 0,
) -> ipywidgets.VBox:
    """A slider over frames.

    Args:
        frames: image files as bytes, one per position of the slider, each at most 8 KB.
        label: the slider's name, shown beside it.
        alts: what each frame shows, one per frame.
        captions: text under each frame.
        values: what the slider reads at each position (thresholds, rates); None counts from 0.
        value: the position that is shown first, an index.

    Raises:
        ValueError: see `View`; or values, a label or a first position that do not fit.
    """
    return linked([View(frames, alts, captions)], label, values=values, value=value)


def choices(
    frames: Sequence[bytes],
    options: Sequence[str],
    label: str,
    alts: Sequence[str],
    *,
    captions: Sequence[str] | None = None,
    value: int = 0,
) -> ipywidgets.VBox:
    """A drop-down menu over frames; the arguments are those of `explorer`, with a name for each frame."""
    view = View(frames, alts, captions)
    control = _menu(label, options, len(view.frames), value)
    return _column(control, _stack(view, control, value))


def linked(
    views: Sequence[View], label: str, *, values: Sequence[Any] | None = None, value: int = 0, menu: bool = False
) -> ipywidgets.VBox:
    """One control that moves several panels at once, side by side where the page is wide enough.

    Args:
        views: the panels, with equally many frames.
        label: the control's name.
        values: what the control reads at each position; None counts from 0. Needed for a menu.
        value: the position that is shown first, an index.
        menu: a drop-down menu instead of a slider.

    Raises:
        ValueError: panels of different length; values, a label or a first position that do not fit.
    """
    counts = [len(view.frames) for view in views]
    if len(set(counts)) != 1:
        raise ValueError(f"all views must have the same number of frames, got {counts}")
    if menu:
        control = _menu(label, values or (), counts[0], value)
    else:
        control = _slider(label, values, counts[0], value)
    return _column(control, *(_stack(view, control, value) for view in views))


def two_way(
    frames: Sequence[Sequence[bytes]],
    labels: tuple[str, str],
    alts: Sequence[Sequence[str]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    values: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None),
    value: tuple[int, int] = (0, 0),
) -> ipywidgets.VBox:
    """Two sliders over a table of frames.

    Args:
        frames: ``frames[i][j]`` is shown where the first slider stands at i and the second at j.
        labels: the names of the two sliders.
        alts, captions: as in `explorer`, tables of the same shape.
        values: what each slider reads; a tuple of two.
        value: the positions shown first.

    Raises:
        ValueError: a table with gaps, or what `explorer` refuses.
    """
    columns = {len(row) for row in frames}
    if len(columns) != 1 or columns == {0}:
        raise ValueError(f"frames must be a table without gaps, got rows of {[len(row) for row in frames]}")
    texts = [alts] if captions is None else [alts, captions]
    for name, table in zip(("alts", "captions"), texts, strict=False):
        if len(table) != len(frames):
            raise ValueError(f"{name} must have {len(frames)} rows, as frames, got {len(table)}")
    views = []
    for i, row in enumerate(frames):
        try:
            views.append(View(row, alts[i], None if captions is None else captions[i]))
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
    first = _slider(labels[0], values[0], len(views), value[0])
    second = _slider(labels[1], values[1], columns.pop(), value[1])
    rows = [_stack(view, second, value[1]) for view in views]
    outer = ipywidgets.Stack(rows, selected_index=value[0], layout=_frame_layout())
    ipywidgets.jslink((first, _trait(first)), (outer, "selected_index"))
    return _column(first, second, outer)


def weight(widget: ipywidgets.Widget) -> int:
    """The bytes of all frames below a widget, as the page carries them (base64)."""
    own = len(widget.value.encode()) if isinstance(widget, ipywidgets.HTML) else 0
    return own + sum(weight(child) for child in getattr(widget, "children", ()))


def predict(question: str, answers: Mapping[str, str], *, result: str = "") -> HTML:
    """A question to commit to before the result is seen: each guess opens to say whether it holds.

    Plain HTML (`details`), so it needs neither a kernel nor a script, and works with the keyboard.

    Args:
        question: plain text.
        answers: guess -> what opens under it, plain text, at least two.
        result: added to whatever opens, e.g. the number that the run gave.

    Raises:
        ValueError: fewer than two guesses.
    """
    if len(answers) < 2:
        raise ValueError(f"a prediction needs at least two guesses, got {len(answers)}")
    # one name for the group: opening a second guess closes the first
    group = f"predict-{zlib.crc32(question.encode()):08x}"
    parts = [f"<p><strong>{html.escape(question)}</strong></p>"]
    for guess, reply in answers.items():
        body = html.escape(" ".join(filter(None, (reply, result))))
        parts.append(f'<details name="{group}"><summary>{html.escape(guess)}</summary><p>{body}</p></details>')
    return HTML(f'<div class="predict">{"".join(parts)}</div>')


def _kind(frame: bytes) -> str | None:
    return next((kind for start, kind in _SIGNATURES.items() if bytes(frame).startswith(start)), None)


def _trait(control: ipywidgets.Widget) -> str:
    # a selection's value stays in Python; its index is what the browser knows
    return "value" if isinstance(control, ipywidgets.IntSlider) else "index"


def _check(label: str, count: int, value: int) -> None:
    if not label.strip():
        raise ValueError("a control needs a label: it is its accessible name")
    if not 0 <= value < count:
        raise ValueError(f"value must be an index in [0, {count - 1}], got {value}")


def _slider(label: str, values: Sequence[Any] | None, count: int, value: int) -> ipywidgets.Widget:
    _check(label, count, value)
    look: dict[str, Any] = {
        "description": label,
        "style": {"description_width": "initial"},
        "layout": ipywidgets.Layout(width="min(30rem, 100%)"),
    }
    if values is None:
        return ipywidgets.IntSlider(value=value, min=0, max=count - 1, **look)
    if len(values) != count:
        raise ValueError(f"values must have {count} entries, one per position of {label!r}, got {len(values)}")
    options = [(_text(v), i) for i, v in enumerate(values)]
    slider = ipywidgets.SelectionSlider(options=options, value=value, **look)
    # ipywidgets forgets this class here; without it the book's script finds no name for the handle
    return slider.add_class("jupyter-widgets")


def _menu(label: str, options: Sequence[Any], count: int, value: int) -> ipywidgets.Widget:
    _check(label, count, value)
    if len(options) != count:
        raise ValueError(f"a menu needs {count} options, one per frame, got {len(options)}")
    return ipywidgets.Dropdown(
        options=[(_text(v), i) for i, v in enumerate(options)],
        value=value,
        description=label,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="max-content"),
    )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _frame_layout() -> ipywidgets.Layout:
    return ipywidgets.Layout(max_width="100%", overflow="visible")


def _stack(view: View, control: ipywidgets.Widget, value: int) -> ipywidgets.Stack:
    # one layout and one style for all frames: separate ones would weigh as much as a small frame each
    layout, style = _frame_layout(), ipywidgets.HTML().style
    captions = view.captions or [""] * len(view.frames)
    frames = [
        ipywidgets.HTML(value=_figure(*parts), layout=layout, style=style)
        for parts in zip(view.frames, view.alts, captions, strict=True)
    ]
    stack = ipywidgets.Stack(frames, selected_index=value, layout=_frame_layout())
    ipywidgets.jslink((control, _trait(control)), (stack, "selected_index"))
    return stack


def _figure(frame: bytes, alt: str, caption: str) -> str:
    # "dark-light" asks the theme not to dim the picture on a dark page: its pixels are data
    data = base64.b64encode(frame).decode()
    # the theme's caption grey is too pale on the panel of the dark page
    style = "color:inherit;text-align:left;max-width:34rem"
    below = f'<figcaption style="{style}">{html.escape(caption)}</figcaption>' if caption else ""
    return (
        f'<figure style="margin:0"><img class="dark-light" style="max-width:100%;height:auto" alt="{html.escape(alt)}" '
        f'src="data:image/{_kind(frame)};base64,{data}">{below}</figure>'
    )


def _column(*children: ipywidgets.Widget) -> ipywidgets.VBox:
    controls = [child for child in children if not isinstance(child, ipywidgets.Stack)]
    panels = [child for child in children if isinstance(child, ipywidgets.Stack)]
    wrap = ipywidgets.Layout(flex_flow="row wrap", max_width="100%")
    return ipywidgets.VBox([*controls, ipywidgets.HBox(panels, layout=wrap)])
