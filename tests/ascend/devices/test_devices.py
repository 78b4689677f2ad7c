"""Choosing devices, and what is said where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from amct_lightning.ascend import AscendStrategy, NPUAccelerator, NPUUnavailableError, register
from amct_lightning.ascend.devices import open_problem, parse_device_ids, unavailable_reason
from tests.ascend.training import Net, fit, loader, make_trainer
from tests.ascend_sim.equipment import prepare
from tests.ascend_sim.plugin import require

ROOT = Path(__file__).parents[3]
TORCH = torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("auto", [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        (1, [0]),
        (3, [0, 1, 2]),
        ("2", [0, 1]),
        ([2], [2]),
        ([3, 0], [3, 0]),
        ((1, 2), [1, 2]),
        ("0,2", [0, 2]),
        (" 1 , 3 ", [1, 3]),
        ("3,", [3]),
    ],
)
def test_devices_are_counted_or_listed(devices: Any, expected: list[int]) -> None:
    assert parse_device_ids(devices, 4) == expected


@pytest.mark.parametrize(
    "devices", [0, "0", -2, True, 1.0, None, [], "", "x", "0,x", "1.5", [0, 0], [-1], [True], ["0"], {"a": 1}, {0, 1}]
)
def test_malformed_devices_are_refused_with_what_is_allowed(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"cannot be used with accelerator='npu'.*Allowed are"):
        parse_device_ids(devices, 4)


@pytest.mark.parametrize("devices", [5, "5", [4], "0,4"])
def test_devices_that_are_not_there_are_refused_with_the_visible_ones(
    devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    with pytest.raises(MisconfigurationException) as caught:
        parse_device_ids(devices, 4)
    assert repr(devices) in str(caught.value)
    assert "sees the devices 0 to 3 (ASCEND_RT_VISIBLE_DEVICES='4,5,6,7')" in str(caught.value)


def test_without_torch_npu_the_command_that_installs_it_is_given(tmp_path: Path) -> None:
    assert "torch_npu" not in sys.modules
    assert not NPUAccelerator.is_available()
    with pytest.raises(NPUUnavailableError, match=f"not installed.*pip install torch_npu=={TORCH}"):
        make_trainer(tmp_path, accelerator="npu", strategy="ascend")


def test_a_version_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "raise SystemExit('must not be imported')", version="2.1.0.post3")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not NPUAccelerator.is_available()
    reason = str(unavailable_reason())
    assert f"torch_npu 2.1.0.post3 does not belong to torch {torch.__version__}" in reason
    assert f"pip install torch_npu=={TORCH}" in reason


def test_a_missing_library_means_that_cann_is_not_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "libhccl.so: cannot open shared object file: No such file or directory"
    install(tmp_path, f"import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nraise ImportError('{missing}')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert not NPUAccelerator.is_available()
    with pytest.raises(NPUUnavailableError, match=r"source /usr/local/Ascend/ascend-toolkit/set_env\.sh") as caught:
        NPUAccelerator()
    assert missing in str(caught.value)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ  # child processes inherit nothing of it


def test_any_other_failure_of_the_import_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "raise RuntimeError('Two accelerators cannot be used at the same time')", version=f"{TORCH}.post1"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not NPUAccelerator.is_available()
    assert "RuntimeError: Two accelerators cannot be used" in str(unavailable_reason())


def test_a_busy_device_is_explained() -> None:
    error = RuntimeError("SetDevice: NPU function error: aclrtSetDevice, error code is 507033\n" + "[ERROR] x " * 500)
    text = str(open_problem(torch.device("cpu"), error))
    assert "busy" in text
    assert "ACL error 507033" in text
    assert "npu-smi info" in text
    assert len(text) < 800


IMPORT = """
import sys
started = []
sys.addaudithook(lambda event, arguments: started.append(arguments) if event.startswith("subprocess") else None)
import amct_lightning.ascend
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from tests.ascend.training import CPU, fit
from pathlib import Path
fit(Path(sys.argv[1]), quantize=True, max_steps=1, **CPU)
assert "torch_npu" not in sys.modules
assert not [arguments for arguments in started if "npu" in str(arguments)], started
assert "npu" in AcceleratorRegistry and "ascend" in StrategyRegistry
assert "npu" in ACCELERATOR_REGISTRY and "ascend" in STRATEGY_REGISTRY.available_strategies()
"""


def test_importing_the_package_makes_the_names_known_and_does_not_import_torch_npu(tmp_path: Path) -> None:
    """Nor does training on the CPU, and nobody asks ``npu-smi``."""
    install(tmp_path, "raise SystemExit('imported')")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", IMPORT, str(tmp_path)], check=True, cwd=ROOT, env=environment)


def test_names_can_be_registered_again() -> None:
    register()
    register()
    assert AcceleratorRegistry["npu"]["accelerator"] is NPUAccelerator
    assert isinstance(StrategyRegistry.get("ascend"), AscendStrategy)


def test_another_accelerator_with_the_strategy_is_refused(tmp_path: Path) -> None:
    for name in ("cpu", "auto"):
        with pytest.raises(MisconfigurationException, match=r"CPUAccelerator.*accelerator='npu'"):
            make_trainer(tmp_path, accelerator=name, strategy="ascend")


WITHOUT_CANN = """
import sys
from pathlib import Path
from amct_lightning.ascend import NPUAccelerator, NPUUnavailableError
from tests.ascend.training import Net, fit, loader, make_trainer
from tests.ascend_sim.equipment import prepare
from tests.ascend_sim.plugin import require
assert not NPUAccelerator.is_available()
try:
    make_trainer(Path(sys.argv[1]), accelerator="npu", devices=1, strategy="ascend")
except NPUUnavailableError as error:
    print(error)
"""


def test_the_real_wheel_without_cann_names_the_script_to_source(tmp_path: Path) -> None:
    """What a user sees who forgot to set CANN's environment: its libraries are not found.

    torch imports torch_npu by itself and fails at once, unless it is told not to.
    """
    require()
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{prepare().site}:{ROOT}"}

    def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, check=False
        )

    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in run("import torch").stderr
    done = run(WITHOUT_CANN, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in done.stdout, done.stderr
    assert "cannot open shared object file" in done.stdout


@pytest.mark.parametrize(
    "visible",
    [
        pytest.param("7", marks=pytest.mark.npu(env={"ASCEND_RT_VISIBLE_DEVICES": "7"})),
        pytest.param("", marks=pytest.mark.npu(env={"ASCEND_RT_VISIBLE_DEVICES": ""})),
    ],
)
def test_no_visible_device_is_explained(tmp_path: Path, visible: str) -> None:
    """There are two, and the variable hides them."""
    assert not NPUAccelerator.is_available()
    with pytest.raises(NPUUnavailableError, match="no NPU is visible") as caught:
        make_trainer(tmp_path, accelerator="npu", devices=1, strategy="ascend")
    for text in (f"ASCEND_RT_VISIBLE_DEVICES={visible!r}", "npu-smi info", "unset ASCEND_RT_VISIBLE_DEVICES"):
        assert text in str(caught.value)


@pytest.mark.npu(env={"SIM_NPU_BUSY": "1"})
def test_a_device_in_use_elsewhere_is_explained(tmp_path: Path) -> None:
    assert fit(tmp_path, max_steps=1, accelerator="npu", strategy="ascend", devices=[0])[0]
    trainer = make_trainer(tmp_path, accelerator="npu", strategy="ascend", devices=[1])
    with pytest.raises(NPUUnavailableError, match=r"npu:1 could not be opened: it is busy.*ACL error 507033") as caught:
        trainer.fit(Net(), loader())
    assert "export ASCEND_RT_VISIBLE_DEVICES=<id>" in str(caught.value)


def install(folder: Path, code: str, version: str | None = None) -> None:
    """A package torch_npu in ``folder``, with a version that fits torch unless one is given."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(code)
    metadata = folder / f"torch_npu-{version or TORCH}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version or TORCH}\n")
