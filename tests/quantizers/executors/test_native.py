"""The kernels and the operator in C++ against the operators of torch: the same bits, but for the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amct_lightning.quantizers.executors import cache
from amct_lightning.quantizers.executors.kernels import KERNELS, Kernel, KernelModule
from amct_lightning.quantizers.executors.native import extension, library, native_kernel

DTYPES = (torch.float32, torch.bfloat16)
SUMS = {"gradients": (1, 2), "scale": (0,)}
"""Outputs that are sums, by kernel."""
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38, -3e38)
"""Values that arithmetic treats in its own way."""


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit; any NaN is as good as another."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def inputs_of(kernel: Kernel, seed: int, length: int, special: int) -> list[Tensor]:
    """Inputs with values of all sizes, near the ends of the range and far from them."""
    generator = torch.Generator().manual_seed(seed)
    rows = kernel.name.endswith("weight") or kernel.name == "scale"

    def values() -> Tensor:
        found = torch.randn(5 * length, generator=generator) * 10.0 ** torch.randint(
            -2, 2, (5 * length,), generator=generator
        )
        found[:special] = torch.tensor(SPECIAL[:special])
        found = found[torch.randperm(5 * length, generator=generator)].to(kernel.dtype)
        return found.view(5, length) if rows else found

    def number(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((), generator=generator)

    clips = [number(-0.1, 3), number(-3, 0.1), number(0.5, 2), number(-2, -0.5)]
    scale, offset = number(0.001, 0.1), torch.round(number(-200, 200))
    scales = scale * torch.rand((5, 1), generator=generator) + 1e-3 if kernel.channel_wise else scale
    return {
        "train": lambda: [values(), *clips],
        "train_codes": lambda: [values(), *clips],
        "grid_train": lambda: [values(), *clips],
        "codes": lambda: [values(), scale, offset],
        "rebuild": lambda: [values(), scale, offset],
        "grid_rebuild": lambda: [values(), scale, offset],
        "gradients": lambda: [values(), values(), clips[2], clips[3], scale, offset],
        "weight": lambda: [values()],
        "grid_weight": lambda: [values(), scale],
        "rebuild_weight": lambda: [values(), scales],
        "scale": lambda: [values(), values(), scales, number(0.01, 1)],
    }[kernel.name]()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.sampled_from([2, 7, 33, 4000]),
    bits=st.sampled_from([4, 8, 16]),
    channel_wise=st.booleans(),
    special=st.integers(0, len(SPECIAL)),
)
def test_kernels_compute_what_the_operators_do(
    name: str, dtype: torch.dtype, seed: int, length: int, bits: int, channel_wise: bool, special: int
) -> None:
    if name in ("train_codes", "codes"):
        bits, special = min(bits, 8), 0  # a NaN has no code that all CPUs agree on
    kernel = Kernel(
        name, bits, channel_wise and name in ("weight", "grid_weight", "rebuild_weight", "scale"), dtype, "cpu"
    )
    tensors = inputs_of(kernel, seed, length, special)
    expected = KernelModule(kernel)(*[tensor.clone() for tensor in tensors])
    run = native_kernel(kernel)
    assert run is not None
    found = run([tensor.clone() for tensor in tensors])
    assert len(found) == len(expected)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if index in SUMS.get(name, ()):
            check_sums(ours, theirs.reshape(ours.shape), tensors)
        else:
            assert same(ours.reshape(theirs.shape), theirs), (index, ours, theirs)


def check_sums(ours: Tensor, theirs: Tensor, tensors: list[Tensor]) -> None:
    """Sums have as many wrong digits as their terms cancel each other."""
    if not all(tensor.isfinite().all() for tensor in (theirs, *tensors)) or any(t.abs().max() > 1e30 for t in tensors):
        assert torch.equal(ours.isfinite(), theirs.isfinite()) or bool((ours.abs() > 1e30).any())
        return
    size = tensors[1].float().abs().sum() * 300
    assert bool(((ours - theirs).abs() <= 2e-5 * size + 1e-30).all()), (ours, theirs)


@pytest.mark.parametrize("name", ["train", "gradients", "weight"])
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    kernel = Kernel(name, 8, name == "weight", torch.float32, "cpu")
    run, found = native_kernel(kernel), []
    assert run is not None
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run(inputs_of(kernel, 0, 20_000, 0)))
    torch.set_num_threads(threads)
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_dtypes_and_devices_have_no_kernels_in_cpp() -> None:
    assert native_kernel(Kernel("rebuild", 8, False, torch.float16, "cpu")) is None
    assert native_kernel(Kernel("rebuild", 8, False, torch.float32, "cuda")) is None


def test_the_operator_is_registered_and_says_what_it_changes() -> None:
    operator: Any = extension.layer_operator("quantized_product")
    assert operator is torch.ops.amct_lightning.quantized_product.default
    changed = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert changed == ["clip_max", "clip_min", "previous_max", "previous_min", "poison", "scale"]


def test_libraries_are_kept_with_their_digests() -> None:
    extension.layer_operator("quantized_product")
    for file in (library.library_file(), extension.extension_file()):
        assert file.parent == cache.cache_folder()
        assert file.with_name(f"{file.name}.sha256").read_text() == cache._digest(file)


@pytest.mark.parametrize("execution", ["compiled", "integer"])
def test_without_the_operators_layers_compute_the_same(execution: str) -> None:
    """As where the headers of torch do not suit the compiler: each part is a kernel by itself."""
    script = (
        "import json, sys, torch\n"
        "from amct_lightning.quantizers.executors.native import executor\n"
        "from tests.modules.cases import Width\n"
        "from tests.modules.executors.cases import Step, alike, calibrated, case_named, same\n"
        "case = case_named('conv')\n"
        "models = alike(calibrated(case, Width()), [sys.argv[1]] * 2)\n"
        "x = case.input()\n"
        "first = Step.of(models[0], x)\n"
        "executor.layer_operator = lambda name: None\n"
        "second = Step.of(models[1], x)\n"
        "print(json.dumps([same(first.output, second.output), *(same(g, second.gradients[n]) for n, g in "
        "first.gradients.items())]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, execution]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert len(told) > 3
    assert all(told)
