"""Counting what Python does, as a measure of time that is the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any


def calls(action: Callable[[], object]) -> int:
    """Count the calls of Python functions."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def steps(action: Callable[[], object], package: str = "amct_lightning") -> Counter[tuple[str, int, str]]:
    """Count the steps of Python's interpreter in each function of a package, comprehensions for themselves.

    Args:
        action: What is done.
        package: The package; what others do is not counted.

    Returns:
        The steps by file, line and name of the function.
    """
    counts: Counter[CodeType] = Counter()

    def note(frame: Any, event: str, arg: Any) -> Any:
        counts[frame.f_code] += event == "opcode"
        return note

    def enter(frame: Any, event: str, arg: Any) -> Any:
        if f"/{package}/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return note

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        action()
    finally:
        sys.settrace(before)
    return Counter({(code.co_filename, code.co_firstlineno, code.co_name): n for code, n in counts.items()})
