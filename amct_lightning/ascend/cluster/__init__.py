"""Ranks and addresses of a job on several nodes."""

from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment

__all__ = ["AscendClusterEnvironment"]
