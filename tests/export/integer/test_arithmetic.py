"""The integer arithmetic against NumPy's int64, which is slow and certain."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from amct_lightning.export.integer.arithmetic import (
    convolution_sums,
    dequant_scale,
    int32_sums,
    matmul_sums,
    quantize,
    unpack_int4,
)


def codes(rng: np.random.Generator, *shape: int, bits: int = 8) -> np.ndarray:
    half = 2 ** (bits - 1)
    return rng.integers(-2 * half + 1, 2 * half, shape)


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def slow_convolution(
    x: np.ndarray, w: np.ndarray, pads: list[int], strides: list[int], dilations: list[int], groups: int
) -> np.ndarray:
    """The definition, in int64."""
    spatial = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)]).astype(np.int64)
    w = w.astype(np.int64)
    kernel = w.shape[2:]
    out = [(x.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(spatial)]
    y = np.zeros((x.shape[0], w.shape[0], *out), np.int64)
    per_group = w.shape[0] // groups
    for channel, *place in itertools.product(range(w.shape[0]), *map(range, out)):
        first = channel // per_group * w.shape[1]
        window = tuple(
            slice(place[i] * strides[i], place[i] * strides[i] + dilations[i] * (kernel[i] - 1) + 1, dilations[i])
            for i in range(spatial)
        )
        part = x[(slice(None), slice(first, first + w.shape[1]), *window)]
        y[(slice(None), channel, *place)] = (part * w[channel]).sum(tuple(range(1, x.ndim)))
    return y


def slow_transposed(
    x: np.ndarray,
    w: np.ndarray,
    pads: list[int],
    strides: list[int],
    dilations: list[int],
    groups: int,
    more: list[int],
) -> np.ndarray:
    """The definition, in int64: every input adds the weight to the outputs that it reaches."""
    spatial, kernel = x.ndim - 2, w.shape[2:]
    full = [(x.shape[2 + i] - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 + more[i] for i in range(spatial)]
    per_group = w.shape[1]
    y = np.zeros((x.shape[0], per_group * groups, *full), np.int64)
    inputs = x.shape[1] // groups
    for channel, *place in itertools.product(range(x.shape[1]), *map(range, x.shape[2:])):
        first = channel // inputs * per_group
        window = tuple(
            slice(place[i] * strides[i], place[i] * strides[i] + dilations[i] * (kernel[i] - 1) + 1, dilations[i])
            for i in range(spatial)
        )
        value = x[(slice(None), channel, *place)].astype(np.int64)
        added = value.reshape(-1, *[1] * (spatial + 1)) * w[channel].astype(np.int64)
        y[(slice(None), slice(first, first + per_group), *window)] += added
    crop = tuple(slice(pads[i], full[i] - pads[spatial + i]) for i in range(spatial))
    return y[(slice(None), slice(None), *crop)]


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    spatial = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial))

    return {
        "seed": draw(st.integers(0, 2**31)),
        "groups": draw(st.sampled_from([1, 2, 3])),
        "inputs": draw(st.integers(1, 3)),
        "outputs": draw(st.integers(1, 2)),
        "kernel": each(1, 3),
        "strides": each(1, 3),
        "dilations": each(1, 2),
        "pads": each(0, 1) + each(0, 1),
        "size": draw(st.integers(5, 7)),
        "bits": draw(st.sampled_from([4, 8, 16])),
    }


class TestSums:
    """Every sum is exact, whatever dtype it was computed in."""

    @settings(max_examples=40, deadline=None)
    @given(convolutions())
    def test_of_convolutions(self, case: dict) -> None:
        rng = np.random.default_rng(case["seed"])
        groups, kernel = case["groups"], case["kernel"]
        x = codes(rng, 2, case["inputs"] * groups, *[case["size"]] * len(kernel), bits=case["bits"])
        w = weights(rng, case["outputs"] * groups, case["inputs"], *kernel)
        names = {name: case[name] for name in ("pads", "strides", "dilations")}
        found = convolution_sums("Conv", torch.from_numpy(x).float(), torch.from_numpy(w), {**names, "group": groups})
        assert np.array_equal(found.long().numpy(), slow_convolution(x, w, *names.values(), groups))

    @settings(max_examples=40, deadline=None)
    @given(convolutions(), st.booleans())
    def test_of_transposed_convolutions(self, case: dict, longer: bool) -> None:
        rng = np.random.default_rng(case["seed"])
        groups, kernel = case["groups"], case["kernel"]
        x = codes(rng, 2, case["inputs"] * groups, *[4] * len(kernel), bits=case["bits"])
        w = weights(rng, case["inputs"] * groups, case["outputs"], *kernel)
        more = [int(longer and (s > 1 or d > 1)) for s, d in zip(case["strides"], case["dilations"], strict=True)]
        names = {name: case[name] for name in ("pads", "strides", "dilations")}
        attributes = {**names, "group": groups, "output_padding": more}
        found = convolution_sums("ConvTranspose", torch.from_numpy(x).float(), torch.from_numpy(w), attributes)
        assert np.array_equal(found.long().numpy(), slow_transposed(x, w, *names.values(), groups, more))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 3000), st.sampled_from([4, 8, 16]))
    def test_of_products(self, seed: int, length: int, bits: int) -> None:
        rng = np.random.default_rng(seed)
        x, w = codes(rng, 2, 3, length, bits=bits), weights(rng, length, 4)
        found = matmul_sums(torch.from_numpy(x).float(), torch.from_numpy(w))
        assert np.array_equal(found.long().numpy(), x @ w.astype(np.int64))

    def test_where_float32_would_lose_a_one(self) -> None:
        """127 * 255 * 600 is above 2**24, so that an odd sum has no float32 number."""
        x = torch.full((1, 601), 255.0)
        x[0, 0] = 1.0
        w = torch.full((601, 1), 127, dtype=torch.int8)
        assert int(matmul_sums(x, w)) == 127 * 255 * 600 + 127

    def test_in_a_process_that_lets_torch_compute_with_fewer_bits(self) -> None:
        rng = np.random.default_rng(0)
        x, w = codes(rng, 64, 64), weights(rng, 64, 64)
        before = torch.get_float32_matmul_precision()
        with fewer_bits():
            found = matmul_sums(torch.from_numpy(x).float(), torch.from_numpy(w))
            assert torch.get_float32_matmul_precision() == "medium"
        assert np.array_equal(found.long().numpy(), x @ w.astype(np.int64))
        assert torch.get_float32_matmul_precision() == before


@contextmanager
def fewer_bits() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TestWrapAround:
    @given(st.lists(st.integers(-(2**45), 2**45), min_size=1), st.integers(-(2**31), 2**31 - 1))
    @example([2**31 - 1], 1)
    @example([2**31 - 2], 1)
    @example([-(2**31) + 1], -1)
    @example([-(2**31)], -1)
    def test_is_that_of_int32(self, values: list[int], bias: int) -> None:
        found, overflows = int32_sums(torch.tensor(values, dtype=torch.float64), torch.tensor([bias]))
        exact = np.array(values, np.int64) + bias
        assert found.dtype == torch.int32
        assert np.array_equal(found.numpy(), exact.astype(np.int32))
        assert overflows == sum(not -(2**31) <= value < 2**31 for value in exact.tolist())


class TestDequantization:
    @given(st.floats(2.0**-100, 2.0**100, width=32))
    def test_keeps_19_bits_of_the_scale(self, scale: float) -> None:
        pattern = np.float32(scale).view(np.uint32)
        parameter = np.array([int(pattern) | 7 << 32], np.uint64)  # what is above the low half does not count
        assert dequant_scale(parameter, 32)[0] == np.float32(scale)
        assert dequant_scale(parameter)[0].view(np.uint32) == pattern >> 13 << 13
        assert 0 <= 1 - dequant_scale(parameter)[0] / np.float32(scale) < 2.0**-10

    def test_with_another_number_of_bits_is_refused(self) -> None:
        with pytest.raises(ValueError, match="deq_bits is 24, it must be 19"):
            dequant_scale(np.zeros(1, np.uint64), 24)


class TestCodes:
    def test_multiply_by_the_reciprocal_and_round_before_the_offset_is_added(self) -> None:
        """x / s + o, as training has it, gives other codes at a tie: 0.5 + 1 rounds to 2, round(0.5) + 1 is 1."""
        x = torch.tensor([0.5, 1.5, -0.5, 200.0, -200.0])
        assert quantize(x, 1.0, 1.0, 8).tolist() == [1.0, 3.0, 1.0, 127.0, -128.0]
        third = float(np.float32(1) / np.float32(3))
        values: Tensor = torch.arange(-300, 300) * 1.5
        expected = np.clip(np.rint(values.numpy().astype(np.float32) * np.float32(third)), -128, 127)
        assert np.array_equal(quantize(values, third, 0.0, 8).numpy(), expected)

    @pytest.mark.parametrize(("bits", "ends"), [(4, (-8, 7)), (8, (-128, 127)), (16, (-32768, 32767))])
    def test_end_where_the_type_does(self, bits: int, ends: tuple[int, int]) -> None:
        assert quantize(torch.tensor([-1e9, 1e9, -torch.inf]), 1.0, 3.0, bits).tolist() == [*ends, ends[0]]


class TestInt4:
    @given(st.integers(0, 2**31), st.integers(0, 2))
    def test_unpacking_undoes_packing_along_any_axis(self, seed: int, axis: int) -> None:
        values = np.random.default_rng(seed).integers(-8, 8, (4, 6, 2)).astype(np.int8)
        even, odd = (np.take(values, range(first, values.shape[axis], 2), axis) for first in (0, 1))
        packed = (even & 15 | odd << 4).astype(np.int8)
        assert np.array_equal(unpack_int4(packed, axis), values)
