"""bdlib: backdoor attacks on image classifiers, and the defences against them, on one device.

from bdlib import attacks, data, defenses, metrics
"""

__version__ = "0.1.0"
