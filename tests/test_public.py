"""The package as it is imported: at once, with its names, and with its strategies known to Lightning."""

from __future__ import annotations

import subprocess
import sys

import pytest

import amct_lightning

IN_A_NEW_PROCESS = """
import sys
import amct_lightning
print({"torch", "lightning", "amct_lightning.ascend"} & {*sys.modules})
import amct_lightning.protocols
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
print({"ascend", "ascend_fsdp"} <= {*StrategyRegistry}, "ascend" in STRATEGY_REGISTRY, "npu" in AcceleratorRegistry)
try:
    Trainer(accelerator="cpu", strategy="ascend")
except Exception as error:
    print(error)
print("amct_lightning.public" in sys.modules)
from amct_lightning import *
print(QuantRetrainCallback.__name__, [name for name in amct_lightning.__all__ if name not in globals()])
"""


def test_importing_it_loads_little_and_lightning_knows_the_strategies_once_it_is_imported() -> None:
    finished = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    loaded, known, refusal, everything, names = finished.stdout.splitlines()
    assert loaded == "set()"
    assert known == "True True True"
    assert refusal.startswith("AscendStrategy trains on NPUs")
    assert everything == "False"  # Lightning alone needs ascend/ only
    assert names == "QuantRetrainCallback []"


def test_names_and_modules_are_attributes_and_others_are_not() -> None:
    assert set(amct_lightning.__all__) <= set(dir(amct_lightning))
    assert amct_lightning.callbacks.QuantMonitor is amct_lightning.QuantMonitor
    with pytest.raises(AttributeError, match=r"^module 'amct_lightning' has no attribute 'QuantMonitr'$"):
        amct_lightning.QuantMonitr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'QuantMonitr'"):
        from amct_lightning import QuantMonitr  # noqa: F401
