"""The bit-true reference: a deploy model in the device's integer arithmetic, on the CPU."""

from amct_lightning.export.integer.network import DeployedNetwork, run_deployed
from amct_lightning.export.integer.units import LayerTrace

__all__ = ["DeployedNetwork", "LayerTrace", "run_deployed"]
