"""Defences and baselines: each a frozen dataclass that repairs a network with clean images alone."""

from bdlib.defenses.anp import ANP
from bdlib.defenses.base import Repair
from bdlib.defenses.fp import FP
from bdlib.defenses.ft import FT
from bdlib.defenses.ft_sam import FTSAM
from bdlib.defenses.ibau import IBAU
from bdlib.defenses.mnp import MNP
from bdlib.defenses.nad import NAD
from bdlib.defenses.npd import NPD
from bdlib.defenses.rnp import RNP

__all__ = ["ANP", "FP", "FT", "FTSAM", "IBAU", "MNP", "NAD", "NPD", "RNP", "Repair"]
