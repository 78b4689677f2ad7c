"""What a layer gives in integer arithmetic: exact sums, and all else as the float layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amct_lightning.modules.integer import Numbers
from tests.modules.integer.cases import BITS, HERE, Case, assert_exact

LAST = torch.channels_last


def offsets(bits: int) -> list[float]:
    half = 2 ** (bits - 1)
    return [-half, half - 1, 0, -5]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind that has an integer product, with an input."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    channels = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    layer = kinds[dims](*channels, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    x = torch.randn(draw(st.integers(1, 2)), channels[0], *(draw(st.integers(5, 8)) for _ in range(dims)))
    return layer, x.to(memory_format=LAST) if dims == 2 and draw(st.booleans()) else x


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(HERE), st.integers(0, 3))
def test_convolution_is_exact_in_integers(made: tuple[nn.Module, Tensor], bits: tuple[int, int], number: int) -> None:
    assert_exact(Case.make(*made, offsets(bits[0])[number], bits))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 200), st.integers(1, 40), st.booleans(), st.data())
def test_linear_layer_is_exact_in_integers(
    rows: list[int], inputs: int, outputs: int, bias: bool, data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from(HERE))
    offset = data.draw(st.sampled_from(offsets(bits[0])))
    assert_exact(Case.make(nn.Linear(inputs, outputs, bias), torch.randn(*rows, inputs), offset, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weight", [-1.0, 1.0])
@pytest.mark.parametrize("offset", [0, -1])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3000, 7, bias=False), (20, 3000)),
        (nn.Conv1d(64, 40, 9, bias=False), (2, 64, 9)),
        (nn.Conv2d(96, 40, 5, bias=False), (2, 96, 6, 6)),
        (nn.Conv2d(64, 64, 5, groups=64, bias=False), (2, 64, 6, 6)),
        (nn.Conv3d(16, 20, 3, bias=False), (2, 16, 4, 4, 4)),
    ],
    ids=["linear", "conv1d", "conv2d", "depthwise", "conv3d"],
)
def test_sums_of_the_largest_codes_do_not_saturate(
    layer: Any, shape: tuple[int, ...], weight: float, offset: int, bits: tuple[int, int]
) -> None:
    with torch.no_grad():
        layer.weight.fill_(weight * 1000)
    numbers = Numbers(torch.tensor(1.0), torch.tensor(float(offsets(bits[0])[offset])), torch.ones(1), bits)
    case = Case(layer, torch.full(shape, 1000.0 if offset == 0 else -1000.0), numbers)
    expected, _ = case.exact()
    assert torch.equal(case.integers(), expected.float())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1), (2, 3, 8, 2)),
        (nn.Conv2d(16, 16, 1, stride=(1, 3), padding=(1, 0), groups=16), (2, 16, 8, 1)),
        (nn.Conv2d(8, 8, (1, 3), padding=(1, 0)), (2, 8, 14, 20)),
        (nn.Conv2d(24, 48, (3, 7), stride=(1, 2), padding=(2, 13), dilation=2, groups=4), (2, 24, 14, 1)),
        (nn.Conv2d(8, 16, 2, padding=1, dilation=(1, 2)), (1, 8, 2, 1)),
        (nn.Conv1d(8, 6, 3, padding=5), (2, 8, 4)),
        (nn.Conv1d(128, 256, 1, stride=2, dilation=2), (2, 128, 1)),
        (nn.Conv3d(1, 2, (2, 1, 7), padding=(1, 1, 7)), (2, 1, 1, 3, 4)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("offset", [-128, 127, 3])
def test_shapes_that_onednn_computes_wrong_are_right(layer: nn.Module, shape: tuple[int, ...], offset: float) -> None:
    case = Case.make(layer, torch.randn(shape), offset)
    assert case.integers().stride() == case.float_layer().stride()
    assert_exact(case)


@pytest.mark.parametrize("begins_at_zero", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_padding_is_the_same_whether_zero_is_known_to_be_the_lowest_code(
    begins_at_zero: bool, layout: torch.memory_format
) -> None:
    x = torch.rand(2, 5, 7, 8).to(memory_format=layout)
    case = Case.make(nn.Conv2d(5, 6, 3, stride=2, padding=1), x, -128)
    expected = case.integers()
    case.numbers = case.numbers._replace(begins_at_zero=begins_at_zero)
    assert torch.equal(case.integers(), expected)
    assert_exact(case)


@pytest.mark.parametrize("offset", [-128, 127, 3])
def test_padding_stands_for_zero(offset: float) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    case = Case.make(layer, torch.zeros(1, 3, 4, 4), offset)
    assert case.integers().abs().max() == 0


@pytest.mark.parametrize("layer", [nn.Linear(50, 8), nn.Conv2d(6, 8, 3, padding=1)])
def test_output_is_that_of_fake_quantization_but_for_the_roundings_of_float(layer: nn.Module) -> None:
    case = Case.make(layer, torch.randn(5, 50) if isinstance(layer, nn.Linear) else torch.randn(5, 6, 9, 9), -31)
    expected, error = case.in_float()
    assert ((case.integers() - expected).abs() <= error).all()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 1, stride=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, 1, stride=(2, 3), groups=2), (2, 4, 7, 8)),
        (nn.Conv3d(4, 6, 1, stride=2), (2, 4, 3, 5, 4)),
    ],
)
def test_convolution_of_one_point_leaves_out_what_it_does_not_read(layer: nn.Module, shape: tuple[int, ...]) -> None:
    case = Case.make(layer, torch.randn(shape), -9)
    assert case.integers().stride() == case.float_layer().stride()
    assert_exact(case)


def test_one_scale_for_the_whole_weight() -> None:
    case = Case.make(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))
    case.numbers = case.numbers._replace(weight_scale=case.numbers.weight_scale[1:2])
    assert_exact(case)


def test_negative_learned_scale() -> None:
    case = Case.make(nn.Linear(30, 6), torch.randn(2, 30))
    case.numbers = case.numbers._replace(weight_scale=-case.numbers.weight_scale)
    assert_exact(case)


SHAPES = {
    "rows": (nn.Linear(8, 5), torch.randn(3, 8)),
    "one row": (nn.Linear(8, 5), torch.randn(8)),
    "axes": (nn.Linear(8, 5), torch.randn(2, 3, 4, 8)),
    "columns": (nn.Linear(8, 5), torch.randn(8, 3).t()),
    "slices": (nn.Linear(8, 5), torch.randn(3, 16)[:, ::2]),
    "no row": (nn.Linear(8, 5), torch.randn(0, 8)),
    "contiguous": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 5)),
    "channels last": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 5).to(memory_format=LAST)),
    "weight channels last": (nn.Conv2d(4, 6, 3).to(memory_format=LAST), torch.randn(2, 4, 7, 5)),
    "one image": (nn.Conv2d(4, 6, 3), torch.randn(4, 7, 5)),
    "no image": (nn.Conv2d(4, 6, 3), torch.randn(0, 4, 7, 5)),
    "one channel": (nn.Conv2d(1, 6, 3, padding="same"), torch.randn(2, 1, 7, 5)),
    "one output": (nn.Conv2d(4, 1, 1), torch.randn(2, 4, 3, 3).to(memory_format=LAST)),
    "one point": (nn.Conv2d(4, 6, 1), torch.randn(2, 4, 1, 1)),
    "one point, channels last": (nn.Conv2d(4, 6, 1), torch.randn(2, 4, 1, 1).to(memory_format=LAST)),
    "every second": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 10)[..., ::2]),
    "expanded": (nn.Conv2d(4, 6, 3), torch.randn(1, 4, 7, 5).expand(3, 4, 7, 5)),
    "signal": (nn.Conv1d(4, 6, 3, padding="valid"), torch.randn(2, 4, 7)),
    "one signal": (nn.Conv1d(4, 6, 3), torch.randn(4, 7)),
    "volume": (nn.Conv3d(4, 6, 3), torch.randn(2, 4, 4, 5, 6)),
    "one volume": (nn.Conv3d(4, 6, 2), torch.randn(3, 5, 6, 4).permute(3, 0, 1, 2)),
    "one image, channels last": (nn.Conv2d(4, 6, 3), torch.randn(7, 5, 4).permute(2, 0, 1)),
    "one line": (nn.Conv2d(16, 16, 1, groups=16), torch.randn(2, 16, 8, 1)),
    "volume, channels last": (
        nn.Conv3d(4, 6, 3),
        torch.randn(2, 4, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_output_has_shape_and_memory_format_of_the_float_layer(name: str) -> None:
    case = Case.make(*SHAPES[name])
    output, expected = case.integers(), case.float_layer()
    assert (output.shape, output.stride()) == (expected.shape, expected.stride())
    assert not output.requires_grad
    assert_exact(case)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 5), torch.randn(3, 7)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 3, 7, 7)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 2, 2)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4)),
    ],
)
def test_input_that_does_not_fit_is_refused_in_the_words_of_the_float_layer(layer: nn.Module, x: Tensor) -> None:
    case = Case.make(layer, x)
    with pytest.raises(RuntimeError) as found:
        case.integers()
    with pytest.raises(RuntimeError) as expected:
        case.float_layer()
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once_to_a_smaller_dtype(dtype: torch.dtype) -> None:
    wide = Case.make(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 5))
    assert torch.equal(wide.integers(dtype=dtype), wide.integers().to(dtype))
    small = Case.make(nn.Linear(8, 5).to(dtype), torch.randn(3, 8, dtype=dtype))
    assert small.integers().dtype == dtype
    assert torch.equal(small.integers(), small.integers(dtype=torch.float32).to(dtype))


def test_autocast_around_it_changes_nothing() -> None:
    case = Case.make(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 5))
    expected = case.integers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.integers(), expected)
