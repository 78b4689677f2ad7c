"""Ascend devices in Lightning: so far the cluster environment of jobs that come with a rank table."""

from amct_lightning.ascend.cluster import AscendClusterEnvironment

__all__ = ["AscendClusterEnvironment"]
