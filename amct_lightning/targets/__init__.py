"""What is known of what a network is deployed to: the Ascend generations, and servers. Standard library only."""

from amct_lightning.targets.facts import ATC_TARGETS, TARGETS, find_target
from amct_lightning.targets.kinds import Atc, Fact, OnUnsupported, Target, TargetName, Verdict
from amct_lightning.targets.networks import SERVED, ServedNetwork

__all__ = [
    "ATC_TARGETS",
    "SERVED",
    "TARGETS",
    "Atc",
    "Fact",
    "OnUnsupported",
    "ServedNetwork",
    "Target",
    "TargetName",
    "Verdict",
    "find_target",
]
