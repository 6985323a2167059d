"""Backdoor attacks: each a frozen dataclass that poisons an image set and hands back its trigger."""

from bdlib.attacks.badnets import BadNets
from bdlib.attacks.base import Poisoned
from bdlib.attacks.blend import Blend
from bdlib.attacks.sig import SIG
from bdlib.triggers import LabelMap, Stamp, Trigger

__all__ = ["SIG", "BadNets", "Blend", "LabelMap", "Poisoned", "Stamp", "Trigger"]
