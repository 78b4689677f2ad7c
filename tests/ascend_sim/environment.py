"""The environment variables that put a Python process, and those it starts, on the simulated machine."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tests.ascend_sim.cache import ROOT
from tests.ascend_sim.equipment import Equipment, prepare

_OF_THE_CALLER = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_HCCL_TIMEOUT = "20"


def npu_environment(devices: int = 2, env: Mapping[str, object] | None = None) -> dict[str, str]:
    """The caller's environment, changed so that `import torch_npu` finds `devices` simulated NPUs.

    What describes the caller's own place among ranks or its own devices is left out. `env` is added last.
    """
    return environment_of(prepare(), devices) | {name: str(value) for name, value in (env or {}).items()}


def environment_of(equipment: Equipment, devices: int) -> dict[str, str]:
    """As npu_environment, for equipment that is still being made."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_THE_CALLER
        and not name.startswith(("SIM_", "ASCEND_", "HCCL_", "PYTEST_", "TORCHELASTIC_", "PL_"))
    }
    path = [str(equipment.bootstrap), str(equipment.site), str(ROOT)]
    path += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry not in path]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path),
        "SIM_NPU": str(devices),
        "SIM_NPU_LIBRARIES": str(equipment.libraries),
        "SIM_HCCL_TIMEOUT": _HCCL_TIMEOUT,
        "HCCL_CONNECT_TIMEOUT": "120",  # the least that HCCL takes; the simulation waits SIM_HCCL_TIMEOUT
        "TASK_QUEUE_ENABLE": "0",  # launch in the calling thread: the kernels read the memory at once
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch_npu only where it is imported
        "OMP_NUM_THREADS": "1",
    }
