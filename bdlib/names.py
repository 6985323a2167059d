"""How the command line and the matrix call attacks, defences and budgets: plain text, resolved to settings here.

attack("wanet", lab)                # WaNet.small(...) on `signs`, WaNet.paper(...) elsewhere
attack("badnets:official", lab)     # a preset by name
defence("anp", "preact_resnet18")   # ANP.paper()
budget("5%", 50_000)                # {"count": 2500}
"""

from dataclasses import replace
from typing import Any

ATTACKS = {  # of bdlib.attacks
    "badnets": "BadNets", "blend": "Blend", "trojan": "TrojanNN", "trojan-patch": "TrojanPatch", "cl": "CL",
    "sig": "SIG", "refool": "Refool", "input-aware": "InputAware", "dynamic": "InputAwareStatic", "wanet": "WaNet",
    "lf": "LF", "ssba": "SSBA", "fc": "FC", "dfst": "DFST", "lira": "LIRA", "a-blend": "AdaptiveBlend",
    "a-patch": "AdaptivePatch", "bpp": "BPP",
}  # fmt: skip
DEFENCES = {  # of bdlib.defenses
    "anp": "ANP", "rnp": "RNP", "mnp": "MNP", "npd": "NPD", "nad": "NAD", "ft": "FT", "ft-sam": "FTSAM", "fp": "FP",
    "i-bau": "IBAU",
}  # fmt: skip
PRESETS = ("paper", "official", "small")  # of every defence


def split(name: str, known: dict[str, str], what: str) -> tuple[str, str]:
    """``"anp:official"`` as its method and its preset, "" where none is named.

    Raises:
        ValueError: a method that is not in `known`, which is listed; "none" is always known.
    """
    method, _, preset = name.partition(":")
    if method not in known and name != "none":
        raise ValueError(f"{what} must be one of {', '.join(known)} or none, got {name!r}")
    return method, preset


def attack(name: str, lab: Any, *, rate: float | None = None) -> Any:
    """The attack of this name, aimed at the lab's target; None for "none".

    Args:
        name: ``"wanet"`` or ``"wanet:official"``. Without a preset: ``small`` on the embedded sets where the attack
            has it, else its defaults; ``paper`` on real data.
        lab: names the data set and the target label.
        rate: share of all training images to poison. Attacks that count in shares of the target class keep their own.

    Raises:
        ValueError: an unknown attack or preset; the message lists the known ones.
    """
    from bdlib import attacks

    method, preset = split(name, ATTACKS, "attack")
    if method == "none":
        return None
    kind = getattr(attacks, ATTACKS[method])
    known = attacks.presets(kind)
    if preset and preset not in known:
        raise ValueError(f"preset of {method} must be one of {', '.join(known)}, got {preset!r}")
    own = known.get("small", kind) if lab.scale.dataset in ("signs", "digits") else known["paper"]
    made = known.get(preset, own)(lab.target)
    return replace(made, rate=rate) if rate is not None and counts_all(name) else made


def counts_all(name: str) -> bool:
    """Whether the poison rate of this attack is a share of *all* training images (clean-label ones: of a class)."""
    from bdlib import attacks

    method, preset = split(name, ATTACKS, "attack")
    if method == "none":
        return False
    kind = getattr(attacks, ATTACKS[method])
    return getattr(attacks.presets(kind).get(preset, kind)(0), "rate", None) is not None


def defence(name: str, network: str) -> Any:
    """The defence of this name; None for "none".

    Args:
        name: ``"anp"`` or ``"anp:official"``. Without a preset: ``small`` for the small network, else ``paper``.
        network: name of the network to repair.

    Raises:
        ValueError: an unknown defence or preset; the message lists the known ones.
    """
    from bdlib import defenses

    method, preset = split(name, DEFENCES, "defence")
    if method == "none":
        return None
    if preset and preset not in PRESETS:
        raise ValueError(f"preset of {method} must be one of {', '.join(PRESETS)}, got {preset!r}")
    return getattr(getattr(defenses, DEFENCES[method]), preset or ("small" if network == "small" else "paper"))()


def budget(text: str, images: int) -> dict[str, int]:
    """A defender's clean budget, for `Lab.clean`: ``"500"``, ``"5%"`` of `images`, or ``"10/class"``.

    Raises:
        ValueError: anything else, or less than one image.
    """
    share, each = text.endswith("%"), text.endswith("/class")
    try:
        value = float(text[:-1]) if share else int(text.removesuffix("/class"))
    except ValueError:
        value = 0
    count = int(value) if not share else round(images * value / 100) if 0 < value <= 100 else 0
    if count < 1:
        raise ValueError(f'clean must be a number of images ("500"), a share ("5%") or "10/class", got {text!r}')
    return {"per_class" if each else "count": count}
