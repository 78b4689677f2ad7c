"""Sharded training on Ascend NPUs."""

from amct_lightning.ascend.fsdp.strategy import AscendFSDPStrategy

__all__ = ["AscendFSDPStrategy"]
