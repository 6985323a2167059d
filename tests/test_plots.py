"""Figures: what they show is checked on their artists, and how they read (size, text, contrast, no colour) on all."""

import io

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text
from PIL import Image

from bdlib import plots

CLASSES = ("stop", "yield", "speed limit 30", "no entry", "priority road", "pedestrians crossing", "keep right")
THRESHOLDS = [i / 20 for i in range(20)]
CURVE = [
    {"threshold": t, "pruned": int(200 * t), "acc": 0.97 - 0.3 * t**2, "asr": max(0.0, 1 - 8 * t), "ra": 0.5 + t / 3}
    for t in THRESHOLDS
]
SEEDS = [
    {"n": n, "seed": s, "method": m, "acc": 0.9 + 0.01 * s, "asr": 0.5 - 0.1 * s, "attack": f"attack {n}"}
    for n in (50, 100, 500)
    for s in (0, 1, 2)
    for m in ("FT", "ANP")
]


def batch(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def stamped(images: torch.Tensor) -> torch.Tensor:
    out = images.clone()
    out[..., -3:, -3:] = 1.0
    return out


def logits(n: int, favourite: int) -> torch.Tensor:
    out = torch.randn(n, len(CLASSES), generator=torch.Generator().manual_seed(1))
    out[:, favourite] += 6
    return out


def masks() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {"stem.1": torch.rand(16, generator=rng), "layer1.0.bn1": torch.cat([torch.zeros(3), torch.ones(29)])}


def epochs(n: int = 6) -> list[dict]:
    return [{"epoch": e, "loss": 2 / (e + 1), "accuracy": 1 - 0.8 / (e + 1)} for e in range(1, n + 1)]


def every_figure() -> dict:
    x = batch()
    change = {name: m.flip(0) for name, m in masks().items()}
    return {
        "images": plots.images(x, list(CLASSES[:4]), kinds=["clean", "triggered"] * 2),
        "wrapped": plots.images(batch(10), [*CLASSES, "a", "b", "c"], columns=8),
        "rows": plots.images([x, stamped(x)], ["#0", "#1", "#2", "#3"], rows=["clean", "triggered"]),
        "triple": plots.triple(x[:2], stamped(x[:2]), logits(2, 0), CLASSES, other_logits=logits(2, 3), target=0),
        "narrow triple": plots.triple(x[0], stamped(x)[0], logits(1, 0)[0], CLASSES, width=5),
        "repaired triple": plots.triple(
            x[:1], stamped(x[:1]), logits(1, 3), CLASSES, other_logits=logits(1, 0), other="before the defence"
        ),
        "verdict": plots.verdict(x[0], logits(1, 0)[0], CLASSES, target=0, other_logits=logits(1, 3)[0]),
        "plain verdict": plots.verdict(x[0], logits(1, 0)[0], CLASSES),
        "history": plots.history({"clean": epochs(), "poisoned": epochs(9)}),
        "curve": plots.curve(CURVE, chosen=0.25, columns=("acc", "asr", "ra")),
        "histogram": plots.mask_histogram(masks(), 0.2),
        "layers": plots.masks_by_layer(masks(), change, threshold=0.2),
        "plain layers": plots.masks_by_layer(masks()),
        "spread": plots.spread(SEEDS, "n", "acc", "method", log=True),
        "two panels": plots.spread(SEEDS, "attack", ("acc", "asr"), "method"),
        "two lines": plots.spread(SEEDS, "n", ("acc", "asr")),
    }


@pytest.fixture(scope="module")
def figures() -> dict:
    return every_figure()


def test_no_figure_stays_open(figures: dict) -> None:
    assert plt.get_fignums() == []


def test_figures_fit_the_page_and_their_text_is_readable_and_inside(figures: dict) -> None:
    for name, fig in figures.items():
        assert fig.get_size_inches()[0] <= 6.5, name
        assert fig.get_facecolor() == (1, 1, 1, 1), f"{name}: dark text needs its own white panel"
        fig.draw_without_rendering()  # lays out
        for text in fig.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                assert text.get_fontsize() >= 8, (name, text.get_text())
        drawn, size = fig.get_tightbbox(), fig.get_size_inches()
        assert min(drawn.x0, drawn.y0) > -0.02 and (drawn.max < size + 0.02).all(), (name, drawn, size)


def test_looks_differ_without_colour() -> None:
    named = [plots.LOOKS[k] for k in ("clean", "triggered", "target", "pruned", "defended")]
    for group in (named, [plots.look("?", i) for i in range(6)]):
        assert len({look.marker for look in group}) == len(group)
        assert len({str(look.dash) for look in group}) >= 5
        assert len({look.hatch for look in group}) == len(group)


def test_every_colour_stands_out_on_white() -> None:
    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    looks = [*plots.LOOKS.values(), *(plots.look("?", i) for i in range(6))]
    for colour in {look.colour for look in looks} | {plots.INK}:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour


def test_style_is_left_as_it_was() -> None:
    before = plt.rcParams["font.size"], plt.rcParams["axes.grid"]
    with plots.style():
        assert plt.rcParams["axes.grid"]
    assert (plt.rcParams["font.size"], plt.rcParams["axes.grid"]) == before


def test_images_show_the_pixels() -> None:
    x = batch(3)
    fig = plots.images(x, columns=2)
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert len(shown) == 3
    for image, array in zip(x, shown, strict=True):
        assert np.array_equal(array, (image * 255).round().byte().permute(1, 2, 0).numpy())
        assert fig.axes[0].images[0].get_interpolation() == "nearest"
    same = plots.images((x * 255).round().byte(), columns=2)
    assert np.array_equal(same.axes[0].images[0].get_array(), shown[0])
    assert plots.images(torch.rand(2, 1, 8, 8)).axes[0].images[0].get_array().shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("grid", "extra", "message"),
    [
        (torch.rand(2, 4, 8, 8), {}, r"C = 1 or 3, got \(4, 8, 8\)"),
        (torch.rand(2, 3, 8, 8) * 255, {}, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), {}, "nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), {}, "int64"),
        (torch.rand(2, 3, 8, 8), {"titles": ["one"]}, "titles must have 2 entries, got 1"),
        (torch.rand(2, 3, 8, 8), {"columns": 0}, "columns must be 1 or more, got 0"),
        (torch.rand(2, 3, 8, 8), {"width": 9}, r"width must be in \(0, 6.5\] inches, got 9"),
        (torch.rand(0, 3, 8, 8), {}, "at least one image"),
        ([torch.rand(2, 3, 8, 8), []], {}, r"got rows of \[2, 0\]"),
    ],
)
def test_images_refuse(grid: torch.Tensor, extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.images(grid, **extra)


def test_triple_amplifies_the_difference_and_keeps_the_clean_class() -> None:
    x = 0.2 + 0.6 * batch(1)
    y = x.clone()
    y[..., :3, :3] += 0.04
    fig = plots.triple(x, y, logits(1, 0), CLASSES, other_logits=logits(1, 0) - 40 * torch.eye(7)[0], target=0)
    clean, difference, triggered, bars = fig.axes[:4]
    assert difference.get_title() == "difference × 20"
    shown = difference.images[0].get_array()
    assert (shown[5:] == 128).all() and (abs(shown[:3, :3].astype(int) - round(255 * 0.9)) <= 1).all()
    assert (clean.get_title(), triggered.get_title()) == ("clean", "with trigger")
    labels = [t.get_text() for t in bars.get_yticklabels()]
    assert labels[0] == "stop" and len(labels) == 5
    assert [t.get_text() for t in fig.legends[0].get_texts()][-1] == "clean"
    # the clean image's class is always among the five, even when the trigger leaves it last
    after = logits(1, 0)
    after[0, 5] = -30
    fig = plots.triple(x, y, after, CLASSES, other_logits=logits(1, 5))
    assert [t.get_text() for t in fig.axes[3].get_yticklabels()][-1] == "pedestrians cro…"
    with pytest.raises(ValueError, match=r"logits must have shape \(1, 7\), got \(1, 3\)"):
        plots.triple(x, y, torch.zeros(1, 3), CLASSES)
    with pytest.raises(ValueError, match="one shape"):
        plots.triple(x, y[..., :-1], logits(1, 0), CLASSES)


def test_the_circles_are_named_for_what_they_are() -> None:
    x = batch(1)
    fig = plots.triple(x, x, logits(1, 3), CLASSES, other_logits=logits(1, 0), other="before the defence")
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["with trigger", "before the defence"]
    assert "before the defence" not in str(plots.triple(x, x, logits(1, 3), CLASSES).legends[0].get_texts())


def test_verdict_shows_the_image_and_the_same_places_in_every_frame() -> None:
    x = batch(2)
    first = plots.verdict(x[0], logits(1, 0)[0], CLASSES, target=0, other_logits=logits(1, 5)[0])
    second = plots.verdict(x[1], logits(1, 2)[0], CLASSES, target=0, other_logits=logits(1, 5)[0])
    names = [t.get_text() for t in first.axes[1].get_yticklabels()]
    assert names[0] == "stop" and "pedestrians cro…" in names and len(names) == 5
    for a, b in zip(first.axes, second.axes, strict=True):
        assert a.get_position().bounds == b.get_position().bounds
    assert not np.array_equal(first.axes[0].images[0].get_array(), second.axes[0].images[0].get_array())
    assert len(plots.png(first)) < 8000
    with pytest.raises(ValueError, match=r"other_logits must have shape \(1, 7\), got \(1, 2\)"):
        plots.verdict(x[0], logits(1, 0)[0], CLASSES, other_logits=torch.zeros(2))


def test_curve_marks_the_choice_and_says_oracle() -> None:
    fig = plots.curve(list(reversed(CURVE)), chosen=0.25)
    ax = fig.axes[0]
    acc, asr = ax.lines[:2]
    assert np.allclose(acc.get_xdata(), THRESHOLDS) and np.allclose(acc.get_ydata()[0], 97)
    assert asr.get_linestyle() != acc.get_linestyle() and asr.get_marker() != acc.get_marker()
    (note,) = ax.texts
    assert "0.25" in note.get_text() and "ACC 95.1 %" in note.get_text() and "ASR 0.0 %" in note.get_text()
    assert note.get_text().startswith("chosen on clean data: 0.25\n")
    (slid,) = plots.curve(CURVE, chosen=0.25, label="slider").axes[0].texts
    assert slid.get_text().startswith("slider: 0.25\n")
    assert "oracle" in ax.get_title(loc="left")
    assert plots.curve(CURVE, oracle=False).axes[0].get_title(loc="left") == ""
    with pytest.raises(ValueError, match="no 'ra' in a record"):
        plots.curve([{"threshold": 0, "pruned": 0, "acc": 1, "asr": 1}], columns=("acc", "ra"))
    with pytest.raises(ValueError, match="at least one threshold"):
        plots.curve([])


def test_histogram_counts_masks_at_the_threshold_as_pruned() -> None:
    fig = plots.mask_histogram({"a": torch.tensor([0.0, 0.2, 0.2, 0.21]), "b": torch.ones(6)}, 0.2, bins=10)
    assert "3 of 10 pruned" in fig.axes[0].texts[0].get_text()
    kept, pruned = fig.axes[0].containers
    assert sum(bar.get_height() for bar in pruned) == 3 and sum(bar.get_height() for bar in kept) == 10
    assert all(bar.get_hatch() for bar in pruned)
    assert not plots.mask_histogram(torch.ones(3)).axes[0].texts
    with pytest.raises(ValueError, match="layer 'a'"):
        plots.mask_histogram({"a": torch.tensor([1.2])})
    with pytest.raises(ValueError, match="at least one channel"):
        plots.mask_histogram({})


def test_layers_draw_every_channel_once() -> None:
    m = masks()
    change = {name: torch.rand(len(v)) for name, v in m.items()}
    fig = plots.masks_by_layer(m, change, threshold=0.2)
    ax = fig.axes[0]
    drawn = np.sort(np.concatenate([c.get_offsets()[:, 0] for c in ax.collections]))
    assert np.allclose(drawn, np.sort(torch.cat(list(m.values())).numpy()), atol=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(m)
    with pytest.raises(ValueError, match=r"shape \(32,\) for layer 'layer1.0.bn1', got None"):
        plots.masks_by_layer(m, {"stem.1": change["stem.1"]})


def test_history_draws_every_run() -> None:
    fig = plots.history({"clean": epochs(3), "poisoned": epochs(5)})
    assert [len(line.get_xdata()) for line in fig.axes[1].lines] == [3, 5]
    assert fig.axes[1].get_ylabel() == "accuracy (%)" and max(fig.axes[1].lines[0].get_ydata()) == pytest.approx(80)
    for empty in ([], {}, {"clean": []}):
        with pytest.raises(ValueError, match="at least one epoch"):
            plots.history(empty)


def test_spread_shows_the_mean_and_every_run() -> None:
    fig = plots.spread(SEEDS, "n", "acc", "method")
    mean, points = fig.axes[0].lines[:2]
    assert np.allclose(mean.get_xdata(), [50, 100, 500]) and np.allclose(mean.get_ydata(), 91)
    assert len(points.get_xdata()) == 9 and points.get_linestyle() == "None"
    assert [len(plots.spread(SEEDS, "n", ("acc", "asr"), g).axes) for g in (None, "method")] == [1, 2]
    with pytest.raises(ValueError, match="no 'rate' in a record"):
        plots.spread(SEEDS, "rate", "acc")
    with pytest.raises(ValueError, match="log needs every n above 0, got 0"):
        plots.spread([{"n": 0, "acc": 1.0}], "n", "acc", log=True)


def test_png_of_an_image_is_exact_and_of_a_figure_small(figures: dict) -> None:
    image = (torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(0)) / 3).float()
    decoded = np.asarray(Image.open(io.BytesIO(plots.png(image, colors=256))).convert("RGB"))
    assert decoded.shape == (64, 64, 3)
    assert np.array_equal(decoded[::4, ::4], (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert Image.open(io.BytesIO(plots.png(image, width=100))).size == (100, 100)

    for name in ("histogram", "two lines", "history"):
        frame = plots.png(figures[name], colors=16)
        assert Image.open(io.BytesIO(frame)).size[0] == pytest.approx(624, abs=1)  # 6.5 inches at 96 per inch
        assert len(frame) <= 8192, (name, len(frame))
        assert frame == plots.png(figures[name], colors=16), "frames must not change from run to run"
    with pytest.raises(ValueError, match=r"colors must be in \[2, 256\], got 1"):
        plots.png(image, colors=1)
    with pytest.raises(ValueError, match="width must be 1 pixel or more, got 0"):
        plots.png(image, width=0)
