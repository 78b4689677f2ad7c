"""The kernels for CPUs, in C++: compiled once for a machine, within seconds, and used wherever that works."""

from amct_lightning.quantizers.executors.native.executor import NativeExecutor
from amct_lightning.quantizers.executors.native.kernels import native_kernel

__all__ = ["NativeExecutor", "native_kernel"]
