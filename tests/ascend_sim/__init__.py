"""Test equipment: the real torch_npu on simulated NPUs. README.md says how to use it."""

from tests.ascend_sim.environment import npu_environment
from tests.ascend_sim.equipment import UnavailableError, native_operators, prepare
from tests.ascend_sim.processes import RankResult, npu_run

__all__ = ["RankResult", "UnavailableError", "native_operators", "npu_environment", "npu_run", "prepare"]
