"""A training step of every quantized layer type uses the kernels of torch_npu only, and never waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ascend.operators.page import COMMAND, PAGE, traced_page
from tests.ascend.operators.steps import Traces, trace_everything
from tests.ascend.operators.tracing import DeviceTrace
from tests.ascend_sim import native_operators

pytestmark = [pytest.mark.npu, pytest.mark.timeout(200)]

STEP_PHASES = {
    "forward",
    "forward, bf16-mixed",
    "forward, half precision",
    "forward, deploy_grid",
    "forward, target serving",
    "frozen",
    "before the start",
    "calibration",
    "backward",
    "optimizer",
    "after the step",
    "step of a monitor",
    "schedule",
    "evaluation",
    "evaluation, deploy_grid",
    "evaluation, target serving",
    "search of the shifts",
}
# Outside of the steps: once per logging interval, and for every checkpoint.
READS_AT_THE_LOGGING_INTERVAL = {
    "amct_lightning/callbacks/nonfinite.py:check": 1,
    "amct_lightning/callbacks/monitor/sampling.py:collect": 1,
}


@pytest.fixture
def traces() -> Traces:
    return trace_everything()  # once per process


def test_nothing_falls_back_to_the_host(capfd: pytest.CaptureFixture[str]) -> None:
    """The first test of the process: torch_npu reports a fallback once per operator."""
    traces = trace_everything()
    assert traces.quantized.operators("fallbacks") == set()
    assert traces.float.operators("fallbacks") == set()
    assert "not currently supported on the NPU" not in capfd.readouterr().err


def test_every_operator_has_a_kernel_that_torch_npu_registers(traces: Traces) -> None:
    used = traces.quantized.operators("kernels")
    assert {"aten::convolution_backward", "aten::addmm", "aten::round", "aten::aminmax", "aten::argmin"} <= used
    assert used <= native_operators()


def test_all_phases_were_traced(traces: Traces) -> None:
    outside = {"logging interval", "record of a checkpoint"}
    assert set(traces.quantized.tables["kernels"]) == STEP_PHASES | outside
    assert all(sum(counts.values()) > 0 for counts in traces.quantized.tables["kernels"].values())


def test_no_step_waits_for_the_device(traces: Traces) -> None:
    assert [wait for wait in traces.quantized.waits if wait.phase in STEP_PHASES] == []
    assert traces.float.waits == []


def test_the_logging_interval_reads_the_device_at_the_documented_places_only(traces: Traces) -> None:
    waits = [wait for wait in traces.quantized.waits if wait.phase == "logging interval"]
    assert Counter(wait.where for wait in waits) == READS_AT_THE_LOGGING_INTERVAL


def test_a_record_reads_the_device_only_where_it_is_derived(traces: Traces) -> None:
    waits = [wait for wait in traces.quantized.waits if wait.phase == "record of a checkpoint"]
    assert {wait.where.partition(":")[0] for wait in waits} == {"amct_lightning/record/derive.py"}


def test_the_page_lists_what_was_traced() -> None:
    assert PAGE.read_text(encoding="utf-8") == traced_page(), f"{PAGE.name} is out of date: run {COMMAND}"


class TestTheTraceItself:
    """What would be wrong in a step is seen by the trace."""

    @pytest.mark.parametrize(
        ("waiting", "what"),
        [
            (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
            (lambda x: bool(x.sum() > 0), "aten::_local_scalar_dense"),
            (lambda x: x.tolist(), "aten::_to_copy"),
            (lambda x: x.cpu(), "aten::_to_copy"),
            (lambda x: torch.zeros(4).copy_(x), "aten::copy_"),
            (lambda x: torch.ones(4).to(x.device), "aten::_to_copy"),
            (lambda x: x.copy_(torch.ones(4)), "aten::copy_"),
            (lambda x: torch.tensor(1.0, device=x.device), "aten::lift_fresh"),
            (lambda x: x.nonzero(), "aten::nonzero"),
            (lambda x: x[x > 0], "aten::index.Tensor"),
            (lambda x: x.masked_select(x > 0), "aten::masked_select"),
            (lambda x: torch.equal(x, x), "aten::equal"),
            (lambda x: torch.npu.synchronize(), "device synchronisation"),
            (lambda x: torch.npu.current_stream().synchronize(), "stream synchronisation"),
            (lambda x: recorded_event().synchronize(), "event synchronisation"),
        ],
    )
    def test_sees_every_way_of_waiting(self, waiting: Callable[[Tensor], Any], what: str) -> None:
        x = torch.ones(4, device="npu")
        with DeviceTrace() as trace:
            waiting(x)
        assert what in {wait.what for wait in trace.waits}
        assert {wait.where for wait in trace.waits} == {"tests/ascend/operators/test_native_step.py:<lambda>"}

    def test_sees_nothing_where_nobody_waits(self) -> None:
        x = torch.ones(4, device="npu", requires_grad=True)
        pinned = torch.ones(4).pin_memory()
        with DeviceTrace() as trace:
            y = torch.where(x > 0, 0.0, x).masked_fill(x < 0, 1.0).add(torch.full((), 2.0, device="npu")).sum()
            y.backward()
            pinned.to("npu", non_blocking=True)
            torch.ones(4).tolist()
        assert trace.waits == []

    def test_sees_a_fallback_and_takes_composite_operators_apart(self) -> None:
        x = torch.ones(4, device="npu", requires_grad=True)
        with DeviceTrace() as trace:
            y = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
            with trace.during("filling"):
                y.masked_fill(x > 2, 0.0)
        assert trace.operators("fallbacks") == {"aten::fake_quantize_per_tensor_affine_cachemask"}
        assert "aten::masked_fill.Scalar" in trace.operators("composites")
        assert "aten::masked_fill_.Scalar" in trace.tables["kernels"]["filling"]


def recorded_event() -> Any:
    event = torch.npu.Event()
    event.record()
    return event
