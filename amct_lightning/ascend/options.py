"""Settings of torch_npu that hold for the whole process."""

from __future__ import annotations

from dataclasses import dataclass

from amct_lightning.ascend.devices import npu


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
