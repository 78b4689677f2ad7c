"""What the verification of exported files found: a table for people, JSON for tools."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from amct_lightning.files import write_text
from amct_lightning.wording import TEXT_BOX, as_text

_LEGEND = (
    "Input: largest difference of the layer's input as the operators before it compute it, in its range. Codes: how "
    "many codes of its input differ in isolation by more than a tie of rounding (and at ties). Outputs: how many "
    "outputs differ in isolation. Flipped: how many codes differ when the whole network runs."
)


@dataclass(frozen=True)
class LayerReport:
    """One layer of one file against the layer of the model.

    *In isolation* the layer of the file is given the very input that the layer of the model had.

    Attributes:
        layer: Name of the layer.
        input_difference: Largest difference of its input, computed by the file's operators from the model's outputs of
            the layers before it, as a part of the largest magnitude; ``None`` if it could not be computed.
        codes: How many codes of its input were compared.
        codes_at_ties: How many differ by one in isolation, where the value is at a tie of rounding.
        codes_wrong: How many differ otherwise in isolation.
        outputs: How many outputs were compared; 0 where the form does not compute the layer in integers.
        outputs_wrong: How many of them differ in isolation by more than the export is known to round.
        largest_difference: The largest difference of an output in isolation.
        codes_flipped: How many codes differ when the whole network runs; ``None`` where that is not seen: a fake-quant
            or QDQ model of 64 MiB and more runs in onnxruntime without being looked into.
        weights_flipped: How many integers of the weight folding a BatchNorm has rounded otherwise than training did.
        overflows: How many int32 sums wrapped around when the whole network ran.
        faults: What is wrong with it, in the order in which it was looked at; none if it is as the model says.
    """

    layer: str
    input_difference: float | None
    codes: int
    codes_at_ties: int
    codes_wrong: int
    outputs: int
    outputs_wrong: int
    largest_difference: float
    codes_flipped: int | None
    weights_flipped: int
    overflows: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputReport:
    """One output of one file against that of the model, when the whole network runs.

    Attributes:
        output: Name of the output in the file.
        step: By how much one code of the last quantized layer's input can move the output at most: the scale of that
            input times the largest weight. ``None`` if no quantized layer is before the output.
        largest: The largest difference, in steps; as it is if there is no step.
        mean: The mean difference, likewise.
        rows: How many rows of scores, along the last axis, have a top class; 0 for an output without classes.
        same_top: In how many of them it is the same one.
        ties: In how many others the model's own scores of the two classes are within half a step of each other.
    """

    output: str
    step: float | None
    largest: float
    mean: float
    rows: int
    same_top: int
    ties: int


@dataclass(frozen=True)
class Departure:
    """A place where a file does not compute what the model does.

    Attributes:
        form: ``"deploy"``, ``"fake_quant"`` or ``"qdq"``.
        layer: Name of the layer; of what comes after the last layer, that one.
        what: What is different.
    """

    form: str
    layer: str
    what: str

    def __str__(self) -> str:
        return f"{self.form}: layer '{self.layer}': {self.what}"


@dataclass(frozen=True)
class FormReport:
    """One file against the model.

    Attributes:
        form: ``"deploy"``, ``"fake_quant"`` or ``"qdq"``.
        file: Its path.
        layers: Its layers in order of execution.
        outputs: Its outputs; none if it could not be run.
        departures: Where it departs from the model, in order of execution.
    """

    form: str
    file: str
    layers: tuple[LayerReport, ...]
    outputs: tuple[OutputReport, ...]
    departures: tuple[Departure, ...]


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """The exported files against the model; it shows itself as a table, in rich in colours.

    Attributes:
        batches: How many batches were run.
        samples: How many samples they had, along the first axis of the first input.
        deq_bits: How many bits of the dequantization scales counted in the deploy model.
        forms: One report per file.
    """

    batches: int
    samples: int
    deq_bits: int
    forms: tuple[FormReport, ...]

    @property
    def ok(self) -> bool:
        """Whether no file departs from the model by more than the known roundings."""
        return not any(form.departures for form in self.forms)

    @property
    def first_departure(self) -> Departure | None:
        """The first place where a file departs, that of the deploy model before those of the others."""
        return next((departure for form in self.forms for departure in form.departures), None)

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite are ``null``."""
        first = self.first_departure
        content = {"ok": self.ok, "first_departure": None if first is None else asdict(first), **asdict(self)}
        return json.dumps(_finite(content), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; a file of that name is replaced at once or stays as it is.

        Args:
            path: The file.
        """
        write_text(path, self.to_json() + "\n")

    def __rich__(self) -> RenderableType:
        """Give rich what it shows."""
        first = self.first_departure
        verdict = (
            Text("The exported files compute what the model does.", style="green")
            if first is None
            else Text(f"First departure: {first}", style="red")
        )
        parts: list[RenderableType] = []
        for form in self.forms:
            parts += [Text(f"\n{form.form} {form.file}"), _outputs(form.outputs), _layers(form.layers)]
            parts += [Text(f"  {departure}", style="red") for departure in form.departures[1:]]
        head = f"{self.samples} sample(s) in {self.batches} batch(es); scales of {self.deq_bits} bits in deploy."
        return Group(Text(head), verdict, *parts, Text(f"\n{_LEGEND}", style="dim"))

    def __str__(self) -> str:
        """Give the table as plain text that fits the terminal."""
        return as_text(self)

    __repr__ = __str__


def _layers(layers: tuple[LayerReport, ...]) -> Table:
    table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    for title in ("Input", "Codes", "Outputs", "Flipped"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Faults", overflow="fold")
    for row in layers:
        flipped = "" if row.codes_flipped is None else f"{row.codes_flipped} of {row.codes}"
        faults = [*row.faults, *([f"{row.overflows} sums overflow int32"] if row.overflows else [])]
        cells = (
            row.layer,
            "?" if row.input_difference is None else f"{row.input_difference:.1g}",
            f"{row.codes_wrong} ({row.codes_at_ties})",
            f"{row.outputs_wrong} of {row.outputs}" if row.outputs else "in float",
            flipped,
            "; ".join(faults) or "-",
        )
        table.add_row(*map(Text, cells), style="red" if row.faults else None)
    return table


def _outputs(outputs: tuple[OutputReport, ...]) -> Table:
    table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False)
    table.add_column("Output", overflow="fold")
    for title in ("Step", "Largest", "Mean", "Same top class", "Ties"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in outputs:
        unit = "" if row.step is None else " steps"
        cells = (
            row.output,
            "-" if row.step is None else f"{row.step:.3g}",
            f"{row.largest:.3g}{unit}",
            f"{row.mean:.2g}{unit}",
            f"{row.same_top} of {row.rows}" if row.rows else "-",
            f"{row.ties} of {row.rows - row.same_top}" if row.rows else "-",
        )
        table.add_row(*map(Text, cells))
    return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
