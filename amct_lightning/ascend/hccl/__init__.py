"""HCCL, the library for collectives between NPUs: its settings, and what strategies do with it."""

from amct_lightning.ascend.hccl.settings import HCCLSettings, NPUOptions

__all__ = ["HCCLSettings", "NPUOptions"]
