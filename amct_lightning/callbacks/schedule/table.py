"""A schedule as a table: which layers are in which phase in which epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from amct_lightning.callbacks.schedule.schedule import LayerPhase, Position, QuantSchedule
from amct_lightning.wording import TEXT_BOX, abbreviated, as_text

_MOST_EPOCHS = 200
Cells = tuple[str, str, str, str]
State = dict[Cells, list[str]]


def schedule_table(schedule: QuantSchedule, layers: Iterable[str], max_epochs: int | None) -> str:
    """Return what a schedule means for the layers of a model, as plain text.

    Args:
        schedule: The schedule.
        layers: Names of the quantized layers.
        max_epochs: Number of epochs of the training; ``None`` if it is not limited by epochs.

    Example:
        >>> print(schedule_table(QuantSchedule(start=1, freeze_bn=3), ["conv", "fc"], 5))
        Epochs  Layers  Quantized  Ranges                    Weight scales  Batch norm
        ------------------------------------------------------------------------------
        0       all     no         -                         -              updated
        1       all     yes        calibrated, then updated  updated        updated
        2       all     yes        updated                   updated        updated
        3 - 4   all     yes        updated                   updated        frozen
    """
    names = list(layers)
    table = Table(box=TEXT_BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("Epochs", "Layers", "Quantized", "Ranges", "Weight scales", "Batch norm"):
        table.add_column(title, overflow="fold")
    states = _states(schedule.with_names(names), names, max_epochs)
    for index, (first, state) in enumerate(states):
        end = states[index + 1][0] if index + 1 < len(states) else max_epochs
        for cells, members in state.items():
            who = "all" if len(members) == len(names) else abbreviated(members)
            table.add_row(*map(Text, (_span(first, end), who, *cells)))
    return as_text(table)


def _states(schedule: QuantSchedule, layers: list[str], max_epochs: int | None) -> list[tuple[int, State]]:
    """Return the epochs in which something changes, each with what holds from then on for which layers."""
    states: list[tuple[int, State]] = []
    before: dict[str, LayerPhase] = {}
    for epoch in _epochs(schedule, max_epochs):
        state: State = {}
        for layer in layers:
            phase = schedule.phase(layer, Position(epoch, max_epochs=max_epochs))
            begins = phase.recalibrates or (phase.calibrates and not (layer in before and before[layer].calibrates))
            state.setdefault(_cells(phase, begins, _updated(schedule, layer)), []).append(layer)
            before[layer] = phase
        if not states or states[-1][1] != state:
            states.append((epoch, state))
    return states


def _epochs(schedule: QuantSchedule, max_epochs: int | None) -> Sequence[int]:
    """Return the epochs in which something may change; of a schedule with rules of its own all that can be told."""
    if type(schedule) is not QuantSchedule:
        return range(min(max_epochs or _MOST_EPOCHS, _MOST_EPOCHS))
    changes = {0}
    for pattern in (None, *schedule.layers):
        own = schedule.with_exception(pattern)
        calibrations = own.calibration_epochs(max_epochs)
        changes |= {own.first_epoch(max_epochs), *calibrations, *(epoch + 1 for epoch in calibrations)}
        changes |= {own.freeze_epoch(part, max_epochs) or 0 for part in ("data", "weights", "bn")}
    return sorted(epoch for epoch in changes if max_epochs is None or epoch < max_epochs)


def _cells(phase: LayerPhase, begins: bool, updated: str) -> Cells:
    ranges = "frozen" if phase.data_frozen else updated
    if not phase.quantized:
        ranges = "kept" if phase.calibrates else "-"
    if begins:
        ranges = f"calibrated, then {ranges}"
    weights = "frozen" if phase.weights_frozen else updated
    batch_norm = "frozen" if phase.bn_frozen else "updated"
    return "yes" if phase.quantized else "no", ranges, weights if phase.quantized else "-", batch_norm


def _updated(schedule: QuantSchedule, layer: str) -> str:
    own = schedule.for_layer(layer)
    periods = ((own.update_every_n_steps, "steps"), (own.update_every_n_epochs, "epochs"))
    return "updated" + "".join(f" every {n} {unit}" for n, unit in periods if n > 1)


def _span(first: int, end: int | None) -> str:
    if end is None:
        return f"{first} -"
    return str(first) if end == first + 1 else f"{first} - {end - 1}"
