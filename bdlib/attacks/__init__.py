"""Backdoor attacks: each a frozen dataclass that poisons images, or trains a victim itself, and gives its trigger."""

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

__all__ = [
    "BPP", "CL", "DFST", "FC", "LF", "LIRA", "SIG", "SSBA", "AdaptiveBlend", "AdaptivePatch", "BadNets", "Blend",
    "InputAware", "InputAwareStatic", "LabelMap", "Poisoned", "Refool", "Stamp", "Trigger", "TrojanNN", "TrojanPatch",
    "WaNet",
]  # fmt: skip
