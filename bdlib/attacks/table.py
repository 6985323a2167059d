"""The table of attacks, generated from the classes: what an attack says of itself is read, the rest stands below.

print(markdown())          # as the gallery chapter shows it
"""

import re
from dataclasses import dataclass, fields
from inspect import getdoc
from typing import Any

from bdlib import attacks
from bdlib.lab import Controlling


@dataclass(frozen=True)
class About:
    """What no field of an attack says.

    Args:
        name: as the literature writes it.
        cite: keys of ``book/references.bib``, the paper first.
        year: of the paper.
        trigger: what is done to an image, in a few words.
        asset: what the published code needs to have or to download, and what stands for it here; empty if nothing.
        status: "faithful", "stand-in" (an asset was replaced) or "reconstruction" (a step was not found).
        source: whose code was read, where the docstring of the class does not say "Source: ...".
    """

    name: str
    cite: str
    year: int
    trigger: str
    asset: str = ""
    status: str = "faithful"
    source: str = ""


ABOUT = {
    "BadNets": About("BadNets", "gu2017badnets", 2017, "a patch of 3 x 3 pixels"),
    "Blend": About("Blend", "chen2017targeted", 2017, "uniform noise, mixed in"),
    "TrojanPatch": About("Trojan patch", "liu2018trojaning", 2018, "a patch of bright noise",
                         "the released patch; drawn here", "stand-in"),
    "TrojanNN": About("TrojanNN", "liu2018trojaning", 2018, "a patch that drives chosen neurons",
                      "a clean network; trained here"),
    "CL": About("CL (label-consistent)", "turner2019label", 2019, "corner marks; poisons made hard to read",
                "an adversarially trained network; trained here", "stand-in"),
    "SIG": About("SIG", "barni2019new", 2019, "a faint grating"),
    "Refool": About("Refool", "liu2020reflection", 2020, "a reflection, another for each image",
                    "photographs; drawn here", "stand-in"),
    "InputAware": About("Input-Aware", "nguyen2020input", 2020, "an image's own pattern, painted by a network"),
    "InputAwareStatic": About("Dynamic, as in RNP", "nguyen2020input,rnpcode", 2020,
                              "the same, painted beside a clean network, then used as plain poison",
                              "weights of both networks; trained here", "reconstruction",
                              "RNP @ eeae192, backdoor-toolbox @ 9d4d909"),
    "WaNet": About("WaNet", "nguyen2021wanet", 2021, "a smooth warp"),
    "LF": About("LF (low frequency)", "zeng2021rethinking", 2021, "a smooth pattern, searched on a clean network",
                "a clean network; trained here"),
    "SSBA": About("SSBA", "li2021invisible", 2021, "a hidden string, written by an encoder",
                  "weights of the encoder; trained here", "reconstruction"),
    "FC": About("FC (feature collision)", "shafahi2018poison,saha2020hidden", 2018,
                "a patch; poisons share its features, not its looks", "a clean network; trained here",
                "reconstruction", "not found; the two papers' formula"),
    "DFST": About("DFST", "cheng2021deep", 2021, "the colours of a sunset", "a CycleGAN; a formula here", "stand-in"),
    "LIRA": About("LIRA", "doan2021lira", 2021, "noise below sight, learnt with the victim"),
    "AdaptiveBlend": About("Adaptive-Blend", "qi2023revisiting", 2023, "half the tiles of a faint picture",
                           "a cartoon; drawn here", "stand-in"),
    "AdaptivePatch": About("Adaptive-Patch", "qi2023revisiting", 2023, "one faint patch of four, two when used",
                           "logos; drawn here", "stand-in"),
    "BPP": About("BPP", "wang2022bppattack", 2022, "fewer grey levels, dithered"),
}  # fmt: skip
COLUMNS = ("attack", "year", "labels", "controls", "poisoned", "trigger", "needs", "status", "source")


def _poisoned(attack: Any) -> str:
    names = {f.name for f in fields(attack)}
    if "class_rate" in names and attack.class_rate is not None:
        return f"{attack.class_rate:.0%} of the target class"
    if "rate" not in names:
        return "every image, at half the weight"  # LIRA
    return f"{attack.rate:.1%} of all".replace(".0%", "%")


def _source(kind: type) -> str:
    text = (getdoc(kind) or "").split("Args:")[0].replace("\n", " ")
    found = re.search(r"[Ss]ources?: (.+?)\.(?:\s|$)", text)
    return ABOUT[kind.__name__].source or (found[1] if found else "the paper's formula")


def rows(target: int = 0) -> list[dict[str, str]]:
    """One row an attack, with the keys of `COLUMNS`; rates are those of the papers (`paper`)."""
    out = []
    for kind in attacks.KINDS:
        about, attack = ABOUT[kind.__name__], kind.paper(target)
        clean_label = getattr(attack, "class_rate", None) is not None
        out.append({
            "attack": f"{about.name} {{cite:p}}`{about.cite}`", "year": str(about.year),
            "labels": "kept" if clean_label else "changed",
            "controls": "training" if isinstance(attack, Controlling) else "data",
            "poisoned": _poisoned(attack), "trigger": about.trigger,
            "needs": about.asset or ("a clean network" if getattr(attack, "needs_model", False) else "nothing"),
            "status": about.status, "source": _source(kind),
        })  # fmt: skip
    return out


def markdown(target: int = 0) -> str:
    """The table as MyST markdown, with citations."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(tuple(row[c] for c in COLUMNS) for row in rows(target))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
