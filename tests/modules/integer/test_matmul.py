"""Linear layers by a matrix product of int8, as on CUDA devices and Ascend NPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from amct_lightning.modules.integer import Numbers, PackedWeight, integer_forward, matmul, why_not
from tests.modules.integer.cases import BITS, Case
from tests.sums import UNIT_ROUNDOFF


def in_python(codes: Tensor, of_weight: Tensor, added: Tensor) -> Tensor:
    return (codes.long() @ of_weight.long().t() + added).int()


def offsets(bits: int) -> tuple[int, ...]:
    half = 2 ** (bits - 1)
    return -half, half - 1, 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 40, 24), (17, 8)])
@pytest.mark.parametrize("outputs", [1, 8, 13])
def test_is_exact(bits: tuple[int, int], number: int, shape: tuple[int, ...], outputs: int) -> None:
    case = Case.make(nn.Linear(shape[-1], outputs), torch.randn(shape), offsets(bits[0])[number], bits)
    check(case, matmul.linear(case.x, case.layer.weight.detach(), case.layer.bias.detach(), case.numbers, in_python))


def check(case: Case, output: Tensor) -> None:
    expected, magnitude = case.exact()
    assert output.shape == expected.shape
    assert ((output.cpu().double() - expected).abs() <= 4.001 * UNIT_ROUNDOFF * magnitude).all()


@pytest.mark.parametrize("weight", [-1.0, 1.0])
@pytest.mark.parametrize("offset", [-128.0, 127.0])
def test_largest_sums_are_exact(weight: float, offset: float) -> None:
    layer = nn.Linear(60000, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1000 * weight)
    numbers = Numbers(torch.tensor(1.0), torch.tensor(offset), torch.ones(1))
    case = Case(layer, torch.full((2, 60000), -1000.0 * offset), numbers)
    expected, _ = case.exact()
    assert expected.abs().max() > 2**30
    assert torch.equal(matmul.linear(case.x, layer.weight.detach(), None, numbers, in_python), expected.float())


class Strict:
    """``torch._int_mm``, with the limits that it has on CUDA."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert not a.shape[1] % 8
        assert not b.shape[1] % 8
        return (a.long() @ b.long()).int()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 5, 3), (16, 8, 8), (17, 9, 1), (40, 7, 20)])
def test_cuda_is_given_shapes_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, rows: int, inputs: int, outputs: int
) -> None:
    monkeypatch.setattr(torch, "_int_mm", Strict())
    codes = torch.randint(-128, 128, (rows, inputs)).to(torch.int8)
    of_weight, added = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8), torch.arange(outputs).int()
    assert torch.equal(matmul.int_mm(codes, of_weight, added), in_python(codes, of_weight, added))


def on_npu(case: Case) -> Tensor:
    weight, bias = case.layer.weight.detach().npu(), case.layer.bias.detach().npu()
    numbers = Numbers(*(tensor.npu() for tensor in case.numbers[:3]), case.numbers.num_bits)
    return integer_forward(case.layer, case.x.npu(), weight, bias, numbers, PackedWeight())


@pytest.mark.npu(devices=1)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("shape", [(5,), (2, 40, 24), (0, 5)])
def test_npu_is_exact(bits: tuple[int, int], number: int, shape: tuple[int, ...]) -> None:
    case = Case.make(nn.Linear(shape[-1], 13), torch.randn(shape), offsets(bits[0])[number], bits)
    assert why_not(case.layer, torch.device("npu:0"), bits) is None
    check(case, on_npu(case))


@pytest.mark.npu(devices=1)
def test_npu_has_no_use_for_these() -> None:
    npu = torch.device("npu:0")
    assert why_not(nn.Conv2d(2, 2, 3), npu, (8, 8)) == (
        "npu_quant_conv2d of torch_npu gives float16, and wants the zero point on the host, which would wait"
    )
    assert why_not(nn.Linear(1, 70000), npu, (8, 8)) == (
        "it has 70000 outputs, npu_quant_matmul of torch_npu takes 65535 at most"
    )


@pytest.mark.npu(devices=1, env={"SIM_NPU_SOC": "Ascend310P3"})
def test_npu_whose_product_gives_no_integers_is_told() -> None:
    assert why_not(nn.Linear(2, 2), torch.device("npu:0"), (8, 8)) == (
        "npu_quant_matmul of torch_npu gives sums of 32 bits on Atlas A2 and A3 only"
    )


@pytest.mark.npu(devices=1)
def test_npu_waits_for_nothing_and_uses_kernels_of_torch_npu() -> None:
    from tests.ascend.operators.tracing import DeviceTrace
    from tests.ascend_sim import native_operators

    case = Case.make(nn.Linear(24, 13), torch.randn(3, 24))
    on_npu(case)
    factors = case.layer.weight.detach(), case.layer.bias.detach(), *case.numbers[:3]
    x, weight, bias, *numbers = (tensor.npu() for tensor in (case.x, *factors))
    with DeviceTrace() as trace:
        integer_forward(case.layer, x, weight, bias, Numbers(*numbers), PackedWeight())
    assert not trace.waits
    assert trace.operators("kernels") | {"npu::npu_quant_matmul"} <= native_operators()
