"""The simulated devices as torch.npu shows them."""

from __future__ import annotations

import time

import pytest
import torch

# One process for all that can share one.
three_small_devices = pytest.mark.npu(devices=3, env={"SIM_NPU_MEM": 64})


@three_small_devices
def test_device_count_and_name() -> None:
    assert torch.npu.device_count() == 3
    assert torch.npu.get_device_name(2) == "Ascend910B1"


@three_small_devices
def test_set_device_decides_where_tensors_are_made() -> None:
    torch.npu.set_device(2)

    assert torch.npu.current_device() == 2
    assert torch.ones(1, device="npu").device == torch.device("npu", 2)


@three_small_devices
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"107001|device"):
        torch.npu.set_device(3)
    assert torch.npu.current_device() == 0


@pytest.mark.npu(devices=4, env={"ASCEND_RT_VISIBLE_DEVICES": "0,2"})
def test_visible_devices_are_counted() -> None:
    assert torch.npu.device_count() == 2


@pytest.mark.npu(devices=0)
def test_a_machine_without_devices() -> None:
    assert torch.npu.device_count() == 0
    assert not torch.npu.is_available()


@three_small_devices
def test_memory_is_accounted_per_device() -> None:
    free_before, total = torch.npu.mem_get_info(1)
    tensor = torch.empty(40 << 20, dtype=torch.uint8, device="npu:1")

    assert total == 64 << 20
    assert torch.npu.memory_allocated(1) >= 40 << 20
    assert torch.npu.memory_allocated(0) == 0
    assert torch.npu.mem_get_info(1)[0] <= free_before - (40 << 20)

    del tensor
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info(1)[0] == free_before


@three_small_devices
def test_a_full_device_says_so_and_works_on() -> None:
    kept = torch.ones(1 << 20, device="npu:0")

    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(100 << 20, dtype=torch.uint8, device="npu:0")

    assert kept.sum().item() == 1 << 20
    assert torch.ones(3, device="npu:0").sum().item() == 3


@three_small_devices
def test_streams_and_events() -> None:
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    stream = torch.npu.Stream()

    with torch.npu.stream(stream):
        start.record()
        time.sleep(0.01)
        result = torch.ones(4, device="npu") * 2
        end.record()
    torch.npu.current_stream().wait_stream(stream)
    end.synchronize()

    assert stream.query()
    assert 10 <= start.elapsed_time(end) < 10_000
    assert result.tolist() == [2.0] * 4


@three_small_devices
def test_pinned_memory_is_known_as_such() -> None:
    pinned = torch.arange(5.0).pin_memory()

    assert pinned.is_pinned()
    assert not torch.arange(5.0).is_pinned()
    assert pinned.to("npu", non_blocking=True).tolist() == [0, 1, 2, 3, 4]


@three_small_devices
@pytest.mark.parametrize("other", ["cpu", "npu:1"])
def test_tensors_on_two_devices_are_refused(other: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="npu:0") + torch.ones(3, device=other)


@three_small_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
def test_values_survive_the_way_to_the_device_and_back(dtype: torch.dtype) -> None:
    values = (torch.randn(4, 6) * 3).to(dtype)

    assert torch.equal(values.to("npu:0").to("npu:1").cpu(), values)
    assert torch.equal(values.to("npu").t()[1:, ::2].cpu(), values.t()[1:, ::2])


@three_small_devices
def test_writes_through_views_are_seen() -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1:3, ::2].mul_(2)
        tensor.t()[2].fill_(7)
        tensor[tensor > 3] = -1
        tensor.view(-1)[3:9].sub_(1)
        return tensor.clamp_(min=-0.5)

    values = torch.randn(4, 6)
    assert torch.equal(change(values.to("npu")).cpu(), change(values.clone()))


@three_small_devices
def test_the_generator_of_a_device_is_its_own() -> None:
    torch.manual_seed(5)
    on_cpu = torch.randn(3)
    torch.manual_seed(5)
    state = torch.npu.get_rng_state()
    first = torch.randn(9, device="npu")

    assert torch.equal(torch.randn(3), on_cpu)
    assert not torch.equal(torch.randn(9, device="npu"), first)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.randn(9, device="npu"), first)


@three_small_devices
def test_an_operator_without_a_kernel_fails_by_its_name() -> None:
    import torch_npu

    with pytest.raises(RuntimeError, match=r"operator FastGelu"):
        torch_npu.fast_gelu(torch.ones(4, device="npu"))
