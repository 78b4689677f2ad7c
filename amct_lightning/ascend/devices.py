"""Which NPUs there are: importing torch_npu when it is needed, counting and choosing devices, saying why none works.

Nothing here initialises a device, and importing this module does not import torch_npu.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_ALLOWED = "Allowed are 'auto', -1 (all), a number of devices, a list such as [0, 2] or the text '0,2'."


class NPUUnavailableError(MisconfigurationException):
    """No NPU can be used; the message says why and which command helps."""


def npu() -> Any:
    """Import torch_npu if that has not happened yet, and give ``torch.npu``.

    Returns:
        The module ``torch.npu``.

    Raises:
        NPUUnavailableError: If torch_npu cannot be imported; the message says what to do.
    """
    reason = import_problem()
    if reason:
        raise NPUUnavailableError(reason)
    return torch.npu  # type: ignore[attr-defined]


def import_problem() -> str | None:
    """Import torch_npu and tell why that does not work.

    Returns:
        The reason and what to do about it, or None if torch_npu is imported.
    """
    if hasattr(torch, "npu") and "torch_npu" in sys.modules:
        return None
    if importlib.util.find_spec("torch_npu") is None:
        return (
            f"torch_npu, PyTorch's backend for Ascend NPUs, is not installed in this environment. "
            f"Install the version that belongs to torch {torch.__version__}: "
            f"pip install torch_npu=={_release(torch.__version__)}"
        )
    installed = _installed_version()
    if installed is not None and _release(installed) != _release(torch.__version__):
        return (
            f"torch_npu {installed} does not belong to torch {torch.__version__}: the first three numbers must be "
            f"equal. Install the one that fits: pip install torch_npu=={_release(torch.__version__)}"
        )
    return _import_torch_npu()


def device_count() -> int:
    """Count the NPUs that this process may use, without initialising any.

    Returns:
        The number of devices; 0 where torch_npu or CANN is missing.

    Example:
        >>> device_count() >= 0
        True
    """
    if import_problem():
        return 0
    try:
        return int(npu().device_count())
    except Exception:  # whatever the driver raises: no device can be used, and asking must not fail
        return 0


def unavailable_reason() -> str | None:
    """Tell why no NPU can be used, with the command that helps; the first obstacle counts.

    The order is: torch_npu is not installed, its version does not fit torch, CANN's environment is not set,
    no device is visible. A device that is visible but busy is noticed only when it is opened.

    Returns:
        The reason, or None if there is a device.
    """
    problem = import_problem()
    if problem or device_count() > 0:
        return problem
    return (
        f"torch_npu is installed, but no NPU is visible to this process ({visible_devices_text()}). "
        f"See which devices the driver knows: npu-smi info. If it lists some, the choice hides them: "
        f"unset {VISIBLE_DEVICES}. In a container, pass the devices in: "
        f"--device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"
    )


def open_problem(device: torch.device, error: BaseException) -> NPUUnavailableError:
    """Explain that a device could not be opened.

    Args:
        device: The device.
        error: What torch_npu raised.

    Returns:
        The error to raise, with the cause and the command that helps.

    Example:
        >>> print(open_problem(torch.device("cpu"), RuntimeError("error code is 507033")))  # doctest: +ELLIPSIS
        cpu could not be opened: it is busy, in use by another container, or out of memory...
    """
    code = re.search(r"error code is (\d+)", str(error))
    number = code.group(1) if code else ""
    if number == "107001":
        why = f"there is no such device among the {device_count()} that this process sees ({visible_devices_text()})"
    else:
        why = "it is busy, in use by another container, or out of memory"
    return NPUUnavailableError(
        f"{device} could not be opened: {why}{f' (ACL error {number})' if number else ''}. See who uses it: "
        f"npu-smi info. Then end that process, or take another device: export {VISIBLE_DEVICES}=<id>. "
        f"torch_npu says: {_first_lines(str(error))}"
    )


def visible_devices_text() -> str:
    """Say in words what ``ASCEND_RT_VISIBLE_DEVICES`` is set to.

    Returns:
        For example ``ASCEND_RT_VISIBLE_DEVICES='0,2'``.

    Example:
        >>> os.environ.get(VISIBLE_DEVICES) or visible_devices_text()
        'ASCEND_RT_VISIBLE_DEVICES is not set'
    """
    value = os.environ.get(VISIBLE_DEVICES)
    return f"{VISIBLE_DEVICES} is not set" if value is None else f"{VISIBLE_DEVICES}={value!r}"


def parse_device_ids(devices: int | str | Sequence[int], count: int) -> list[int]:
    """Turn ``Trainer(devices=...)`` into the numbers of the devices.

    The numbers count the visible devices: with ``ASCEND_RT_VISIBLE_DEVICES=4,6`` there are the devices 0 and 1.

    Args:
        devices: ``"auto"`` or -1 for all, a number of devices (also as text), a list, or a text such as ``"0,2"``.
        count: How many devices are visible.

    Returns:
        The numbers, in the order given.

    Raises:
        MisconfigurationException: If the value is malformed or asks for devices that are not there.

    Example:
        >>> parse_device_ids("auto", 2), parse_device_ids(2, 8), parse_device_ids("0,2", 8), parse_device_ids("2", 8)
        ([0, 1], [0, 1], [0, 2], [0, 1])
    """
    wanted = _normalized(devices)
    if isinstance(wanted, int):
        if wanted == 0 or wanted < -1:
            raise _refused(devices, _ALLOWED)
        numbers = list(range(count if wanted == -1 else wanted))
    else:
        numbers = wanted
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise _refused(devices, "A list needs at least one device, no negative number and none twice. " + _ALLOWED)
    if max(numbers) >= count:
        seen = f"the devices 0 to {count - 1}" if count else "no device"
        raise _refused(
            devices,
            f"This process sees {seen} ({visible_devices_text()}); numbers count the visible devices. "
            f"Ask for fewer, or make more of them visible (all are listed by: npu-smi info).",
        )
    return numbers


def _normalized(devices: int | str | Sequence[int]) -> int | list[int]:
    """An int is a number of devices (-1: all), a list names them."""
    if isinstance(devices, str):
        text = devices.strip()
        if text == "auto":
            return -1
        parts = [part.strip() for part in text.split(",")]
        if not all(re.fullmatch(r"-?\d+", part) for part in parts if part) or not any(parts):
            raise _refused(devices, _ALLOWED)
        numbers = [int(part) for part in parts if part]
        return numbers if "," in text else numbers[0]
    if isinstance(devices, (list, tuple)) and all(type(entry) is int for entry in devices):
        return list(devices)
    if type(devices) is int:  # True is an int as well, but not a number of devices
        return devices
    raise _refused(devices, _ALLOWED)


def _refused(devices: object, why: str) -> MisconfigurationException:
    return MisconfigurationException(f"devices={devices!r} cannot be used with accelerator='npu'. {why}")


def _import_torch_npu() -> str | None:
    autoload = os.environ.get(_AUTOLOAD)
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a broken installation raises what it likes; asking must not fail
        return _import_failure(error)
    finally:
        # torch_npu sets it while it is imported and leaves it so if that fails; child processes would inherit it
        if autoload is None:
            os.environ.pop(_AUTOLOAD, None)
        else:
            os.environ[_AUTOLOAD] = autoload
    return None


def _import_failure(error: Exception) -> str:
    text = _first_lines(str(error))
    if "cannot open shared object" in text or "libascend" in text or "libhccl" in text:
        return (
            f"torch_npu is installed, but CANN's libraries are not found ({text}). Set CANN's environment in the shell "
            f"that starts Python: source /usr/local/Ascend/ascend-toolkit/set_env.sh (from CANN 8.5 on: "
            f"source /usr/local/Ascend/cann/set_env.sh). Where there is no NPU and no CANN, "
            f"export {_AUTOLOAD}=0 keeps 'import torch' working."
        )
    return (
        f"torch_npu cannot be imported: {type(error).__name__}: {text}. Install the version that belongs to "
        f"torch {torch.__version__} anew: pip install --force-reinstall --no-deps "
        f"torch_npu=={_release(torch.__version__)}"
    )


def _installed_version() -> str | None:
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:  # a source checkout on the path
        return None


def _release(version: str) -> str:
    """The numbers that torch and torch_npu must share: 2.13.0 of ``2.13.0+cpu`` and of ``2.13.0.post2``."""
    numbers = re.match(r"\d+(\.\d+){0,2}", version)
    return numbers.group() if numbers else version


def _first_lines(text: str, limit: int = 300) -> str:
    """Messages of torch_npu are long: the beginning holds the function and the code."""
    short = " ".join(text.split())
    return short if len(short) <= limit else short[:limit] + "..."
