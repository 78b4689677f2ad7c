"""What the command ``npu-smi`` says about devices: utilisation, temperature, power, high-bandwidth memory (HBM)."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

UTILISATION = "npu.utilization (%)"
TEMPERATURE = "npu.temperature (°C)"
POWER = "npu.power (W)"
MEMORY_USED = "npu.hbm_used (MB)"
MEMORY_TOTAL = "npu.hbm_total (MB)"
_PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")
_BUS_ADDRESS = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}")
_UNKNOWN = ("NA", "N/A", "-", "")  # where a bus address would be, for a device that does not answer
_PROCESSES = re.compile(r"process", re.IGNORECASE)


def parse_npu_smi(text: str) -> list[dict[str, float]]:
    """Read the table that ``npu-smi info`` prints.

    A device has two lines: the first with its name, health, power and temperature, the second with its bus
    address, utilisation and memory. A card with two chips has such a pair for each. The columns differ between
    releases; what cannot be read is left out, and no input is an error.

    Args:
        text: The output of ``npu-smi info``.

    Returns:
        One mapping per chip, in the order of the table, with those of the values that were found.

    Example:
        >>> table = '''
        ... | NPU   Name   | Health       | Power(W)  Temp(C)           Hugepages-Usage(page) |
        ... | Chip         | Bus-Id       | AICore(%) Memory-Usage(MB)  HBM-Usage(MB)         |
        ... | 0     910B3  | OK           | 91.6      48                0    / 0              |
        ... | 0            | 0000:C1:00.0 | 7         0    / 0          4152 / 65536          |'''
        >>> chip, = parse_npu_smi(table)
        >>> chip["npu.utilization (%)"], chip["npu.temperature (°C)"], chip["npu.hbm_used (MB)"]
        (7.0, 48.0, 4152.0)
    """
    chips: list[dict[str, float]] = []
    pending: dict[str, float] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if any(_PROCESSES.search(cell) for cell in cells):
            break  # the table of processes follows
        if len(cells) != 3 or not cells[0][:1].isdigit():
            continue
        if _BUS_ADDRESS.search(cells[1]) or (pending is not None and cells[1] in _UNKNOWN):
            chips.append({**(pending or {}), **_second_line(cells[2])})
            pending = None
        else:
            pending = _numbers(cells[2], POWER, TEMPERATURE)
    return chips


class NPUSmi:
    """Asks ``npu-smi``, which takes a good part of a second, no more often than every ``interval`` seconds.

    Args:
        interval: Seconds for which an answer is used again.
        timeout: Seconds after which a question is given up.
        command: Name or path of the program, and its arguments.
    """

    def __init__(
        self, interval: float = 10.0, timeout: float = 5.0, command: Sequence[str] = ("npu-smi", "info")
    ) -> None:
        self._interval = interval
        self._timeout = timeout
        self._command = list(command)
        self._chips: list[dict[str, float]] = []
        self._asked = -math.inf
        self._usable = True

    def chip(self, number: int) -> dict[str, float]:
        """Give the values of one chip.

        Args:
            number: Its position in the table, from 0.

        Returns:
            The values; empty where ``npu-smi`` is missing, fails or does not know the chip. A program that failed
            is not asked again.
        """
        if self._usable and time.monotonic() - self._asked >= self._interval:
            self._asked = time.monotonic()
            self._ask()
        return dict(self._chips[number]) if 0 <= number < len(self._chips) else {}

    def _ask(self) -> None:
        try:
            answer = subprocess.run(self._command, capture_output=True, timeout=self._timeout, check=True)
        except (OSError, subprocess.SubprocessError):
            self._usable, self._chips = False, []
            return
        self._chips = parse_npu_smi(answer.stdout.decode(errors="replace"))


def physical_position(device: int, visible: str | None) -> int:
    """Find a device's line in the table of ``npu-smi``, which lists hidden devices as well.

    Args:
        device: The number of the device in this process.
        visible: The value of ``ASCEND_RT_VISIBLE_DEVICES``.

    Returns:
        The position in the table; -1 if the variable has no such entry.

    Example:
        >>> physical_position(1, None), physical_position(1, "4,6")
        (1, 6)
    """
    if not visible:
        return device
    entries = [entry.strip() for entry in visible.split(",")]
    if device < len(entries) and entries[device].isdigit():
        return int(entries[device])
    return -1


def _second_line(cell: str) -> dict[str, float]:
    values = _numbers(cell, UTILISATION)
    pairs = _PAIR.findall(cell)
    if pairs:  # the last pair is the HBM, or the only memory of a device without one
        values |= {MEMORY_USED: float(pairs[-1][0]), MEMORY_TOTAL: float(pairs[-1][1])}
    return values


def _numbers(cell: str, *names: str) -> dict[str, float]:
    """The first words under their names, without those that are no numbers ("NA", "-")."""
    found: dict[str, float] = {}
    for name, word in zip(names, cell.split(), strict=False):
        with suppress(ValueError):
            found[name] = float(word)
    return {name: value for name, value in found.items() if math.isfinite(value)}
