"""What is known of the Ascend generations that a network is deployed to. Imports the standard library only."""

from amct_lightning.targets.facts import TARGETS, Fact, OnUnsupported, Target, TargetName, Verdict, find_target

__all__ = ["TARGETS", "Fact", "OnUnsupported", "Target", "TargetName", "Verdict", "find_target"]
