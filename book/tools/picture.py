"""Draw the picture of README and intro: a stop sign, with a sticker, before and after the repair.

python book/tools/picture.py           # writes book/_static/readme.png
"""

from pathlib import Path

import matplotlib.pyplot as plt

from bdlib import plots
from bdlib.attacks import BadNets
from bdlib.defenses import ANP
from bdlib.lab import Lab
from bdlib.training import predict

OUT = Path(__file__).resolve().parents[1] / "_static" / "readme.png"


def main() -> None:
    """Train the victim of the chapters (or find it in the store), repair it, show what both say of one sign."""
    lab = Lab("small")
    victim = lab.victim(BadNets(target=lab.target), seed=0)
    repaired = ANP.small()(victim.model, lab.clean(seed=0), seed=0).model
    stops = lab.test.floats[lab.test.labels == 0]
    stamped = victim.trigger(stops)
    fooled = predict(victim.model, stamped).softmax(1)[:, lab.target] * predict(repaired, stamped).softmax(1)[:, 0]
    bright = stops.mean((1, 2, 3)) > 0.42  # a picture that is shown small should not be a night scene
    pick = int((fooled * bright).argmax())
    cases = [
        ("as it is", victim.model, stops),
        ("with a sticker", victim.model, stamped),
        ("repaired", repaired, stamped),
    ]
    with plots.style():
        fig, axes = plt.subplots(1, 3, figsize=(6.5, 2.7), layout="constrained")
        for ax, (title, model, images), kind in zip(axes, cases, ("clean", "triggered", "defended"), strict=True):
            share, label = predict(model, images[pick : pick + 1]).softmax(1)[0].max(0)
            look = plots.look(kind)
            ax.imshow(images[pick].permute(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=title)
            ax.grid(False)
            ax.set_xlabel(
                f"“{lab.test.classes[int(label)]}”, {100 * float(share):.0f} %", color=look.colour, fontsize=11
            )
            for spine in ax.spines.values():
                spine.set(visible=True, color=look.colour, linewidth=3, linestyle=look.dash)
        fig.savefig(OUT, dpi=150)
        plt.close(fig)
    print(f"picture: {OUT.relative_to(OUT.parents[2])}, test image {pick} of the stop signs")


if __name__ == "__main__":
    main()
