"""Defences and baselines: each a frozen dataclass that repairs a network with clean images alone."""

from bdlib.defenses.anp import ANP
from bdlib.defenses.base import Repair
from bdlib.defenses.fp import FP
from bdlib.defenses.ft import FT

__all__ = ["ANP", "FP", "FT", "Repair"]
