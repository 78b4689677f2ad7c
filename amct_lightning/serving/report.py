"""What comparing a checkpoint for servers with the model found, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from amct_lightning.files import write_text
from amct_lightning.wording import TEXT_BOX, as_text

_LEGEND = (
    "Codes and outputs: how many differ when the server's layer is given the very input that the model's layer had; "
    "outputs of W8A8 have to be equal, those of other types within the rounding of float sums."
)


@dataclass(frozen=True)
class ServedLayerReport:
    """One layer of the checkpoint against that of the model, given the same input.

    Attributes:
        layer: Its name.
        kind: ``"W8A8"``, ``"W8A8_DYNAMIC"`` or ``"W8A16"``.
        codes: How many codes of its input were compared; 0 where the model has none to compare.
        codes_wrong: How many of them differ.
        outputs: How many outputs were compared.
        outputs_wrong: How many of them differ by more than the order of a float sum explains; of ``W8A8`` by anything.
        largest_difference: The largest difference of an output.
    """

    layer: str
    kind: str
    codes: int
    codes_wrong: int
    outputs: int
    outputs_wrong: int
    largest_difference: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it; ``None`` if it is as the model says."""
        if self.codes_wrong:
            return f"{self.codes_wrong} of {self.codes} codes of its input differ"
        if self.outputs_wrong:
            return f"{self.outputs_wrong} of {self.outputs} outputs differ, by {self.largest_difference:.3g} at most"
        return None


@dataclass(frozen=True)
class ServedDeparture:
    """A place where the checkpoint is not what the model is.

    Attributes:
        layer: Name of the layer, or of the module whose tensor differs.
        what: What is different.
    """

    layer: str
    what: str

    def __str__(self) -> str:
        return f"layer '{self.layer}': {self.what}"


@dataclass(frozen=True)
class ServedLogits:
    """An output of the whole network, as the server has it and as the model has it.

    Attributes:
        rows: How many rows of scores, along the last axis, were compared.
        equal: In how many of them all scores are equal.
        same_top: In how many of them the highest score is that of the same class or token.
        largest_difference: The largest difference of a score.
    """

    rows: int
    equal: int
    same_top: int
    largest_difference: float


@dataclass(frozen=True, repr=False)
class ServingReport:
    """A checkpoint for servers against the model; it shows itself as a table, in rich in colours.

    Attributes:
        folder: The checkpoint.
        dtype: The dtype of the server.
        batches: How many batches were run.
        layers: Its quantized layers in order of execution.
        logits: The output of the whole network.
        departures: Where it departs from the model, in order of execution.
    """

    folder: str
    dtype: str
    batches: int
    layers: tuple[ServedLayerReport, ...]
    logits: ServedLogits
    departures: tuple[ServedDeparture, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer computes what that of the model does, and every tensor is the model's."""
        return not self.departures

    @property
    def first_departure(self) -> ServedDeparture | None:
        """The first place where it departs."""
        return self.departures[0] if self.departures else None

    def to_json(self) -> str:
        """Return the report as JSON."""
        first = self.first_departure
        content = {"ok": self.ok, "first_departure": None if first is None else asdict(first), **asdict(self)}
        return json.dumps(content, indent=2)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; a file of that name is replaced at once or stays as it is.

        Args:
            path: The file.
        """
        write_text(path, self.to_json() + "\n")

    def __rich__(self) -> RenderableType:
        """Give rich what it shows."""
        first, logits = self.first_departure, self.logits
        verdict = (
            Text("The server computes what the model does.", style="green")
            if first is None
            else Text(f"First departure: {first}", style="red")
        )
        whole = (
            f"Whole network: {logits.equal} of {logits.rows} rows of scores equal, {logits.same_top} with the same "
            f"highest one, largest difference {logits.largest_difference:.3g}."
        )
        more = [Text(f"  {departure}", style="red") for departure in self.departures[1:]]
        head = f"{self.folder}: {len(self.layers)} quantized layers in {self.dtype}, {self.batches} batch(es)."
        return Group(Text(head), verdict, *more, Text(whole), self._table(), Text(f"\n{_LEGEND}", style="dim"))

    def _table(self) -> Table:
        table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False)
        table.add_column("Layer", overflow="fold")
        table.add_column("Type", no_wrap=True)
        for title in ("Codes", "Outputs"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.layers:
            codes = f"{row.codes_wrong} of {row.codes}" if row.codes else "-"
            cells = row.layer, row.kind, codes, f"{row.outputs_wrong} of {row.outputs}"
            table.add_row(*map(Text, cells), style="red" if row.fault else None)
        return table

    def __str__(self) -> str:
        """Give the table as plain text that fits the terminal."""
        return as_text(self)

    __repr__ = __str__
