"""Codes as 8-bit integers are those of the formula, whatever the memory format and the size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amct_lightning.modules.integer.codes import MANY, unsigned_codes, weight_codes
from amct_lightning.quantizers.functional import quantize


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.floats(2.0**-20, 2.0**10, width=32),
    st.sampled_from([4, 8]),
    st.data(),
)
def test_codes_are_those_of_the_formula(numbers: list[float], scale: float, bits: int, data: st.DataObject) -> None:
    half = 2 ** (bits - 1)
    offset = torch.tensor(float(data.draw(st.integers(-half, half - 1))))
    x, s = torch.tensor(numbers), torch.tensor(scale)
    assert torch.equal(unsigned_codes(x, s, offset, bits).float() - half, quantize(x, s, bits, offset))
    assert torch.equal(weight_codes(x[:, None], s[None], bits).float(), quantize(x[:, None], s, bits))


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])
    codes = unsigned_codes(x, torch.tensor(0.5), torch.tensor(0.0), 8).int() - 128
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2]


def test_compiled_codes_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Inductor's cache on disk would give a CPU the loops of another one: its key knows nothing of vectors.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, scale, offset = torch.randn(3, 70000) * 30, torch.tensor(0.13), torch.tensor(-7.0)
    compiled = torch.compile(unsigned_codes, dynamic=True, fullgraph=True)
    for bits in (4, 8):
        assert torch.equal(compiled(x, scale, offset, bits), unsigned_codes(x, scale, offset, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced"])
def test_large_inputs_have_the_same_codes(dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(3, 5, 200, MANY // 2500, dtype=dtype)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(0, 3)
    elif layout == "sliced":
        x = x[..., 1:]
    assert x.numel() > MANY
    scale, offset = torch.tensor(0.02), torch.tensor(-7.0)
    codes = unsigned_codes(x, scale, offset, 8)
    assert torch.equal(codes.float() - 128, quantize(x.float(), scale, 8, offset))
    assert codes.is_contiguous(memory_format=torch.channels_last) == (layout == "channels last")
