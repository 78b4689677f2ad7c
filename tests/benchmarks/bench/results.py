"""What was measured, as data: numbers with their spread, and the JSON files that hold them."""

from __future__ import annotations

import dataclasses
import json
import statistics
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from amct_lightning.files import write_text
from amct_lightning.wording import abbreviated, closest
from tests.benchmarks.bench.machine import Machine
from tests.benchmarks.timing import Seconds

FORM = 1
_T = TypeVar("_T")


@dataclass(frozen=True)
class Spread:
    """The median of several values, and their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the quartiles of one or more values."""
        if len(values) == 1:
            return cls(*values * 3)
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Clocks:
    """Two clocks: that on the wall, and the processor's in all threads of the process."""

    wall: Spread
    cpu: Spread

    @classmethod
    def of(cls, seconds: Sequence[Seconds]) -> Clocks:
        """Return medians and quartiles of what was timed."""
        return cls(*(Spread.of([each[clock] for each in seconds]) for clock in range(2)))

    @classmethod
    def ratio(cls, seconds: Sequence[Seconds], base: Sequence[Seconds]) -> Clocks:
        """Return medians and quartiles of the ratios of what was timed in the same rounds."""
        ratios = [Seconds(*(a / b for a, b in zip(*pair, strict=True))) for pair in zip(seconds, base, strict=True)]
        return cls.of(ratios)


@dataclass(frozen=True)
class Facts:
    """What can be counted of a step.

    Attributes:
        operators: Operators that forward and backward dispatch.
        host_syncs: Those among them that make the host wait for a device.
        kept_bytes: What autograd keeps for backward, parameters and buffers of the network left out.
        kept_bytes_with_model: The same with them.
        alive_bytes: What the allocator has handed out by the end of the forward, whoever keeps it.
        peak_bytes: How far that rises in a step above what is there between two steps.
    """

    operators: int
    host_syncs: int
    kept_bytes: int
    kept_bytes_with_model: int
    alive_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Timing:
    """The time of a step in a number of threads: in seconds, and as ratios to those it is compared with, by name."""

    threads: int
    seconds: Clocks
    ratios: dict[str, Clocks]


@dataclass
class Measured:
    """A variant on a network; if it failed, only why.

    Attributes:
        variant: The name of the variant.
        title: What it is called in tables.
        failed: Why it could not be trained; empty if it could.
        facts: What was counted.
        stages: The seconds of conversion, calibration, record and compilation, those that it has.
        timings: The time of a step, for each number of threads.
    """

    variant: str
    title: str
    failed: str = ""
    facts: Facts | None = None
    stages: dict[str, Clocks] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)


@dataclass
class NetworkResults:
    """All variants on one network, the float one first."""

    network: str
    title: str
    quantized_layers: int
    measured: list[Measured] = field(default_factory=list)

    @property
    def float_facts(self) -> Facts:
        """What was counted in float."""
        [facts] = [each.facts for each in self.measured[:1] if each.facts is not None]
        return facts


@dataclass
class Results:
    """One run of the benchmark.

    Attributes:
        machine: Where.
        rounds: How many rounds there were.
        left_out: The variants that could not be measured here, and why.
        networks: What was measured.
    """

    machine: Machine
    rounds: int
    left_out: dict[str, str] = field(default_factory=dict)
    networks: list[NetworkResults] = field(default_factory=list)


def save(results: Any, path: Path) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps({"form": FORM, **dataclasses.asdict(results)}, indent=1) + "\n")


def load(kind: type[_T], path: Path) -> _T:
    """Read results that ``save`` wrote.

    Raises:
        ValueError: If the file holds something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("form", None) != FORM:
        raise ValueError(f"{path}: is no result of this benchmark, or one of another version (form {FORM} is read).")
    return typing.cast(_T, _build(kind, content, str(path)))


def _build(kind: Any, value: Any, where: str) -> Any:
    """Make of JSON what a type says; ``where`` is the file and the keys on the way."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(inner[0], value, where)
    if origin is list and isinstance(value, list):
        return [_build(inner[0], each, f"{where}[{number}]") for number, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _build(inner[1], each, f"{where}: {key}") for key, each in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if value.keys() != hints.keys():
            wrong = sorted(value.keys() ^ hints.keys())
            raise ValueError(
                f"{where}: {abbreviated(wrong)} missing or unknown, the keys are {abbreviated(hints)}."
                + closest(wrong[0], hints)
            )
        return kind(**{key: _build(hint, value[key], f"{where}: {key}") for key, hint in hints.items()})
    if origin is None and isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool):
        return value
    raise ValueError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}.")
