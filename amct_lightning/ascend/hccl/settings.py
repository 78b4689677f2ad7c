"""Settings of HCCL, the library for collectives between NPUs, and of torch_npu; both hold for the whole process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from amct_lightning.ascend.devices import npu


@dataclass(frozen=True)
class HCCLSettings:
    """Settings that become environment variables before the process group starts; None leaves a variable alone.

    Args:
        connect_timeout: Seconds that ranks wait for each other at the start (``HCCL_CONNECT_TIMEOUT``; HCCL's default
            is 120). Raise it where ranks start at different times, e.g. because data is prepared on one of them.
        exec_timeout: Seconds a collective waits for the other ranks (``HCCL_EXEC_TIMEOUT``). Raise it where one rank
            works longer between two collectives, e.g. to write a large checkpoint.
        buffer_size: MB of device memory for the buffer between two devices (``HCCL_BUFFSIZE``; HCCL's default is 200).
        deterministic: Whether sums are added in a fixed order, which costs time (``HCCL_DETERMINISTIC``);
            ``"strict"`` also keeps the result independent of how the ranks are spread over servers.

    Raises:
        MisconfigurationException: If a number is not a positive integer or a choice is unknown.

    Example:
        >>> HCCLSettings(connect_timeout=600, deterministic=True).variables()
        {'HCCL_CONNECT_TIMEOUT': '600', 'HCCL_DETERMINISTIC': 'true'}
    """

    connect_timeout: int | None = None
    exec_timeout: int | None = None
    buffer_size: int | None = None
    deterministic: bool | Literal["strict"] | None = None

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "exec_timeout", "buffer_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                unit = "MB" if name == "buffer_size" else "seconds"
                raise MisconfigurationException(
                    f"hccl_{name}={value!r} is not valid: give a whole number of {unit}, at least 1, or None."
                )
        if self.deterministic not in (None, True, False, "strict"):
            raise MisconfigurationException(
                f"hccl_deterministic={self.deterministic!r} is not valid: give True, False, 'strict' or None."
            )

    def variables(self) -> dict[str, str]:
        """Give the environment variables.

        Returns:
            Name and value of those that are to be set.
        """
        values = {
            "HCCL_CONNECT_TIMEOUT": self.connect_timeout,
            "HCCL_EXEC_TIMEOUT": self.exec_timeout,
            "HCCL_BUFFSIZE": self.buffer_size,
            "HCCL_DETERMINISTIC": self.deterministic,
        }
        return {name: str(value).lower() for name, value in values.items() if value is not None}

    def apply(self) -> None:
        """Set the environment variables of this process; what was set before to another value is replaced, and said.

        HCCL reads them when the process group starts, so that later changes have no effect.
        """
        variables = self.variables()
        if variables and dist.is_available() and dist.is_initialized():
            rank_zero_warn(
                f"The process group exists already, so {', '.join(variables)} has no effect. Let the strategy make "
                f"it, or set the variables in the shell."
            )
            return
        for name, value in variables.items():
            before = os.environ.get(name, value)
            if before != value:
                rank_zero_warn(f"{name}={before} of the environment is replaced by {value}, as the strategy says.")
            os.environ[name] = value


@dataclass(frozen=True)
class NPUOptions:
    """How the NPU computes; None leaves torch_npu's own default.

    Args:
        hf32_matmul: Whether float32 matrix products may use HF32: faster, with about 10 bits of mantissa. torch_npu's
            default is no.
        hf32_conv: The same for convolutions. torch_npu's default is yes.
        allow_internal_format: Whether tensors may be kept in the device's own memory formats.

    Example:
        >>> NPUOptions(hf32_conv=False)
        NPUOptions(hf32_matmul=None, hf32_conv=False, allow_internal_format=None)
    """

    hf32_matmul: bool | None = None
    hf32_conv: bool | None = None
    allow_internal_format: bool | None = None

    def apply(self) -> None:
        """Set them in this process."""
        device = npu()
        if self.hf32_matmul is not None:
            device.matmul.allow_hf32 = self.hf32_matmul
        if self.hf32_conv is not None:
            device.conv.allow_hf32 = self.hf32_conv
        if self.allow_internal_format is not None:
            device.config.allow_internal_format = self.allow_internal_format
