"""Settings of HCCL and of precision; these tests need no NPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

from amct_lightning.ascend import AscendStrategy, NPUPrecision
from amct_lightning.ascend.hccl import HCCLSettings
from amct_lightning.ascend.precision import npu_precision
from amct_lightning.ascend.tensors import on_cpu


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_BUFFSIZE", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "before")  # so that monkeypatch puts the state from before the test back
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("clean_environment")
def test_hccl_settings_become_environment_variables() -> None:
    HCCLSettings(connect_timeout=600, exec_timeout=1800, buffer_size=512, deterministic="strict").apply()
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "600"
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "1800"
    assert os.environ["HCCL_BUFFSIZE"] == "512"
    assert os.environ["HCCL_DETERMINISTIC"] == "strict"


@pytest.mark.usefixtures("clean_environment")
def test_what_is_not_given_stays_and_what_is_replaced_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "300")
    monkeypatch.setenv("HCCL_BUFFSIZE", "400")
    with pytest.warns(UserWarning, match="HCCL_CONNECT_TIMEOUT=300 of the environment is replaced by 600"):
        HCCLSettings(connect_timeout=600, deterministic=False).apply()
    assert os.environ["HCCL_BUFFSIZE"] == "400"
    assert os.environ["HCCL_DETERMINISTIC"] == "false"
    assert "HCCL_EXEC_TIMEOUT" not in os.environ


@pytest.mark.parametrize(
    "setting",
    [
        {"hccl_connect_timeout": 0},
        {"hccl_exec_timeout": 1.5},
        {"hccl_buffer_size": "200"},
        {"hccl_buffer_size": True},
        {"hccl_deterministic": "yes"},
    ],
)
def test_an_invalid_hccl_setting_is_named(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(MisconfigurationException, match=f"{name}={value!r}"):
        AscendStrategy(**setting)


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true", "16-true"])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_choice_of_lightning_is_replaced_by_the_twin_for_npus(name: Any) -> None:
    chosen = MixedPrecision(name, "cuda") if name.endswith("mixed") else HalfPrecision(name)
    twin = npu_precision(chosen)
    assert isinstance(twin, NPUPrecision)
    assert (twin.precision, twin.device) == (name, "npu")
    assert (twin.scaler is not None) == (name == "16-mixed")


def test_float32_and_plugins_of_the_user_stay() -> None:
    class Own(Precision):
        pass

    for plugin in (Precision(), NPUPrecision("bf16-mixed"), MixedPrecision("bf16-mixed", "npu"), Own(), None):
        assert npu_precision(plugin) is plugin


def test_float64_is_refused_at_once() -> None:
    with pytest.raises(MisconfigurationException, match=r"64-true.*HCCL.*32-true"):
        AscendStrategy(precision_plugin=DoublePrecision())


def test_a_precision_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(MisconfigurationException, match=r"'8-mixed'.*32-true, bf16-mixed, 16-mixed, bf16-true"):
        NPUPrecision("8-mixed")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="uses no scaler"):
        NPUPrecision("bf16-mixed", scaler=torch.amp.GradScaler("cpu"))


def test_hooks_that_cannot_work_are_refused() -> None:
    state = PostLocalSGDState(None, None, 10)  # type: ignore[no-untyped-call]
    with pytest.raises(MisconfigurationException, match="PostLocalSGDState"):
        AscendStrategy(ddp_comm_state=state, ddp_comm_hook=default_hooks.allreduce_hook)
    with pytest.raises(MisconfigurationException, match="without the ddp_comm_hook"):
        AscendStrategy(ddp_comm_wrapper=default_hooks.fp16_compress_wrapper)


def test_a_checkpoint_without_npu_tensors_passes_unchanged() -> None:
    shared = torch.ones(2)
    checkpoint = {"state_dict": torch.nn.BatchNorm1d(2).state_dict(), "x": (shared, [shared, 1, "a"]), "none": None}
    copied = on_cpu(checkpoint)
    assert copied is not checkpoint
    assert copied["x"][0] is copied["x"][1][0] is shared
    assert copied["state_dict"]._metadata == checkpoint["state_dict"]._metadata
