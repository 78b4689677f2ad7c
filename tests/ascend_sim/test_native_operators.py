"""The list of the operators that torch_npu itself has kernels for."""

from __future__ import annotations

import pytest
import torch

from tests.ascend_sim import native_operators


@pytest.mark.npu
def test_the_list_is_of_the_wheel_and_not_of_the_simulation() -> None:
    native = native_operators()

    assert {
        "aten::add.Tensor",
        "aten::round",
        "aten::clamp.Tensor",
        "aten::aminmax",
        "aten::_foreach_mul_.Scalar",
    } <= native
    assert (
        not {"aten::fake_quantize_per_tensor_affine_cachemask", "aten::quantile", "aten::histogram.bins_tensor"}
        & native
    )


@pytest.mark.npu
def test_every_native_name_is_an_operator_with_a_kernel() -> None:
    for name in native_operators():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"), name


@pytest.mark.npu
def test_an_operator_that_is_not_native_runs_on_the_host(capfd: pytest.CaptureFixture[str]) -> None:
    result = torch.fake_quantize_per_tensor_affine(torch.randn(5, device="npu"), 0.1, 0, -128, 127)

    assert "fake_quantize_per_tensor_affine_cachemask' is not currently supported on the NPU" in capfd.readouterr().err
    assert result.device.type == "npu"
