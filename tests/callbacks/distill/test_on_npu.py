"""On an NPU: the teacher adds no wait for the device and no operator without a kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from amct_lightning import QuantRetrainCallback
from tests.ascend.operators.test_native_step_trainer import BATCHES, EPOCHS, LOG_EVERY, batches_with, trace_training

pytestmark = pytest.mark.npu


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("precision", ["16-mixed"])
def test_a_taught_step_waits_no_more_and_every_operator_has_a_kernel(tmp_path: Path, precision: Any) -> None:
    def trace(number: int, **distill: Any) -> Any:
        folder = tmp_path / str(number)
        callbacks: list[pl.Callback] = [
            QuantRetrainCallback(record_file=folder / "r.txt", distill=distill or None),
        ]
        return trace_training(folder, callbacks, precision)

    distill = {"layers": ["net.*"], "weight": 1.0, "final_weight": 0.5}
    plain, *taught = trace(0), trace(1, **distill), trace(2, **distill, offload=True, dtype="bfloat16")
    before = batches_with(plain.waits)
    for traced in taught:
        assert traced.operators("fallbacks") == set()
        waits = batches_with(traced.waits)
        for batch in range(BATCHES * EPOCHS):
            if (batch + 1) % LOG_EVERY:  # the metric is read when it is logged
                assert waits.get(batch, Counter()) == before.get(batch, Counter()), f"batch {batch}"
