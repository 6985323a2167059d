"""Backdoor attacks: each a frozen dataclass that poisons images, or trains a victim itself, and gives its trigger."""

from collections.abc import Callable
from typing import Any

from bdlib.attacks.adaptive import AdaptiveBlend, AdaptivePatch
from bdlib.attacks.badnets import BadNets
from bdlib.attacks.base import Poisoned
from bdlib.attacks.blend import Blend
from bdlib.attacks.bpp import BPP
from bdlib.attacks.dfst import DFST
from bdlib.attacks.feature_collision import FC
from bdlib.attacks.input_aware import InputAware
from bdlib.attacks.input_aware_static import InputAwareStatic
from bdlib.attacks.label_consistent import CL
from bdlib.attacks.lira import LIRA
from bdlib.attacks.low_frequency import LF
from bdlib.attacks.refool import Refool
from bdlib.attacks.sig import SIG
from bdlib.attacks.ssba import SSBA
from bdlib.attacks.trojan import TrojanPatch
from bdlib.attacks.trojan_nn import TrojanNN
from bdlib.attacks.wanet import WaNet
from bdlib.triggers import LabelMap, Stamp, Trigger

KINDS = (
    BadNets, Blend, TrojanPatch, TrojanNN, CL, SIG, Refool, InputAware, InputAwareStatic, WaNet, LF, SSBA, FC, DFST,
    LIRA, AdaptiveBlend, AdaptivePatch, BPP,
)  # fmt: skip


def presets(kind: type) -> dict[str, Callable[..., Any]]:
    """The presets of a class of attacks by name: ``paper``, ``official``, and others where it has them."""
    return {n: getattr(kind, n) for n, m in vars(kind).items() if isinstance(m, classmethod)}


def every(target: int = 0) -> dict[str, Any]:
    """All attacks, by class name, with the settings that the book's records use at the small scale.

    That is ``small`` where a class has it, else its defaults; see the class for what that costs and why.
    """
    return {kind.__name__: getattr(kind, "small", kind)(target) for kind in KINDS}


__all__ = [
    "BPP", "CL", "DFST", "FC", "LF", "LIRA", "SIG", "SSBA", "AdaptiveBlend", "AdaptivePatch", "BadNets", "Blend",
    "InputAware", "InputAwareStatic", "LabelMap", "Poisoned", "Refool", "Stamp", "Trigger", "TrojanNN", "TrojanPatch",
    "WaNet", "every", "presets",
]  # fmt: skip
