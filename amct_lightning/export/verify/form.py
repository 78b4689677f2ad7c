"""Comparing one file with the model, batch by batch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from amct_lightning.export.integer.graph_file import GraphFile, Source
from amct_lightning.export.integer.network import DeployedNetwork, QuantizedNetwork
from amct_lightning.export.integer.segments import check_inputs
from amct_lightning.export.integer.units import IntegerLayer, LayerTrace, Unit
from amct_lightning.export.verify.expected import ExpectedLayer
from amct_lightning.export.verify.float_forms import reader_of
from amct_lightning.export.verify.isolation import isolated, same_input
from amct_lightning.export.verify.outputs import OutputComparison, output_step
from amct_lightning.export.verify.recognise import form_of
from amct_lightning.export.verify.report import Departure, FormReport
from amct_lightning.export.verify.running import Row, made_by_model, observed_session
from amct_lightning.export.verify.static import static_faults
from amct_lightning.export.verify.torch_side import Call, TorchRun, onnx_inputs, torch_codes

GLUE_TOLERANCE = 5e-5
"""Up to this part of the range, two implementations of the same float operators may differ in what a layer reads."""

_AFTER = "the operators after it, up to output"


class FormVerification:
    """One file, compared with the model as batches come.

    Args:
        form: ``"deploy"``, ``"fake_quant"`` or ``"qdq"``.
        source: The file, or the model read from it.
        layers: The layers of the model.
        deq_bits: How many bits of the dequantization scale count in the deploy model.
        kept_bits: How many of them stand in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of that form.
    """

    def __init__(
        self, form: str, source: Source, layers: Mapping[str, ExpectedLayer], deq_bits: int, kept_bits: int = 32
    ) -> None:
        self.form, self.layers, self.deq_bits, self.kept_bits = form, layers, deq_bits, kept_bits
        file = GraphFile(source)
        own = form_of(file.nodes)
        if own not in (form, None):
            raise ValueError(f"{file.label} is of the form {own}, not {form}. Give it by that name: {{{own!r}: ...}}.")
        if form == "deploy":
            self.network: QuantizedNetwork = DeployedNetwork(file, deq_bits=deq_bits)
        else:
            self.network = QuantizedNetwork(reader_of(form, file))
        self.file = self.network.file
        self.faults: dict[str, list[str]] = {}
        self.rows: dict[str, Row] = {}
        self.called = self._match_names()
        self.outputs = [OutputComparison(name, output_step(self._before(name))) for name in self.file.outputs]
        self._session: Any = None
        self._compare_numbers()

    def check(self, given: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return a batch by the names of the file's inputs.

        Args:
            given: What the model is called with, by the names of its arguments.

        Raises:
            ValueError: If it does not fit the file.
        """
        return check_inputs(self.file, onnx_inputs(given, self.file))

    def add(self, given: Mapping[str, torch.Tensor], run: TorchRun) -> None:
        """Compare on a batch.

        Args:
            given: What the model was called with, by the names of its arguments.
            run: What came of that.
        """
        inputs = self.check(given)
        self._glue(inputs, run)
        for unit in self.network.units:
            self._isolated(unit, run)
        self._free_run(inputs, run)

    def report(self, order: list[str]) -> FormReport:
        """Return what was found.

        Args:
            order: The layers in order of execution.
        """
        known = [name for name in order if name in self.layers]
        names = list(dict.fromkeys([*known, *self.layers, *self.faults]))
        rows = tuple(self._row(name).report(name, self.layers.get(name), self.faults.get(name, ())) for name in names)
        departures = tuple(
            Departure(self.form, name, what)
            for late in (False, True)
            for name in names
            for what in self.faults.get(name, ())
            if what.startswith(_AFTER) == late
        )
        outputs = tuple(output.report() for output in self.outputs if output.values)
        return FormReport(self.form, self.file.path or self.file.label, rows, outputs, departures)

    def _match_names(self) -> dict[str, tuple[str, int]]:
        """Return for every unit the layer of the model and which of its calls it is."""
        found, seen = {}, Counter[str]()
        for unit in self.network.units:
            name = unit.name
            shorter = re.sub(r"(\.call|[._:#])\d+$", "", name)
            name = shorter if name not in self.layers and shorter in self.layers else name
            found[unit.name] = (name, seen[name])
            seen[name] += 1
        return found

    def _compare_numbers(self) -> None:
        for unit in self.network.units:
            name, _ = self.called[unit.name]
            expected = self.layers.get(name)
            if expected is None:
                self._fault(name, "it is no quantized layer of the model")
            else:
                for fault in static_faults(unit, expected):
                    self._fault(name, fault)
        for name in self.layers:
            if name not in {layer for layer, _ in self.called.values()}:
                self._fault(name, "it is not quantized in the file")

    def _glue(self, inputs: dict[str, np.ndarray], run: TorchRun) -> None:
        """Let the file compute what each layer reads, from the model's outputs of the layers before."""
        reached: set[str] = set()

        def compute(unit: Unit, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            reached.add(unit.name)
            name, call = self._call(unit, run)
            if call is None:
                raise ValueError(f"'{unit.name}' is no call of a layer of the model")
            self._compare_inputs(name, unit, arrays, call)
            return made_by_model(unit, arrays, call, self.layers.get(name))

        try:
            outputs = self.network.compute(inputs, compute)
        except (ValueError, RuntimeError) as error:
            left = [unit for unit in self.network.units if unit.name not in reached]
            name = self.called[(left or self.network.units)[0].name][0] if self.network.units else ""
            self._fault(name, f"what it reads cannot be computed from the layers before: {error}")
            return
        for comparison, array, wanted in zip(self.outputs, outputs.values(), run.outputs, strict=False):
            fault = comparison.glue_fault(array, wanted, GLUE_TOLERANCE)
            if fault is not None:
                before = self.network.units_before(comparison.name) or self.network.units
                name = self.called[before[-1].name][0] if before else ""
                self._fault(name, f"{_AFTER} '{comparison.name}': {fault}")
        if len(outputs) != len(run.outputs) and self.network.units:
            last = self.called[self.network.units[-1].name][0]
            self._fault(last, f"{_AFTER}s: {len(outputs)} instead of {len(run.outputs)}")

    def _compare_inputs(self, name: str, unit: Unit, arrays: dict[str, np.ndarray], call: Call) -> None:
        row = self._row(name)
        try:
            difference = same_input(arrays[unit.quantizer.source], call, unit.quantizer)
        except ValueError as error:
            self._fault(name, f"what it reads: {error}{self._between(unit)}")
            return
        row.input_difference = max(row.input_difference or 0.0, difference)
        if not difference <= GLUE_TOLERANCE:
            text = f"what it reads differs by {difference:.1%} of its range{self._between(unit)}"
            self._fault(name, text)
        if not isinstance(unit, IntegerLayer):
            for source, wanted in zip(unit.reads[1:], call.state, strict=False):
                array = torch.from_numpy(np.array(arrays[source]))
                if array.numel() != wanted.numel() or not torch.allclose(
                    array.reshape(wanted.shape), wanted, 0.0, GLUE_TOLERANCE * float(wanted.abs().max())
                ):
                    self._fault(name, f"the initial state '{source}' that it reads differs")

    def _between(self, unit: Unit) -> str:
        before = [f"'{self.called[other.name][0]}'" for other in self.network.units_before(unit.quantizer.source)]
        return f"; it is computed from the output of {' and '.join(before)}" if before else "; no layer is before it"

    def _isolated(self, unit: Unit, run: TorchRun) -> None:
        name, call = self._call(unit, run)
        if call is None or name not in self.layers:
            return
        try:
            found = isolated(unit, self.layers[name], call, self.deq_bits if self.form == "deploy" else self.kept_bits)
        except (ValueError, RuntimeError) as error:
            self._fault(name, f"in isolation: {error}")
            return
        row = self._row(name)
        row.codes += found.codes
        row.ties += found.ties
        row.wrong += found.wrong
        row.outputs += found.outputs
        row.outputs_wrong += found.outputs_wrong
        row.largest = max(row.largest, found.largest)
        if found.wrong:
            self._fault(name, "codes of its input differ in isolation")
        if found.outputs_wrong:
            self._fault(name, "outputs differ in isolation by more than rounding")

    def _free_run(self, inputs: dict[str, np.ndarray], run: TorchRun) -> None:
        try:
            found = self._deployed(inputs, run) if self.form == "deploy" else self._in_onnxruntime(inputs, run)
            for comparison, array, wanted in zip(self.outputs, found, run.outputs, strict=False):
                comparison.add(array, wanted)
        except (ValueError, RuntimeError) as error:
            if not self.faults:
                first = self.network.units[0].name if self.network.units else ""
                self._fault(first, f"the file cannot be run: {error}")

    def _deployed(self, inputs: dict[str, np.ndarray], run: TorchRun) -> list[np.ndarray]:
        assert isinstance(self.network, DeployedNetwork)
        units = {unit.name: unit for unit in self.network.units}

        def observe(trace: LayerTrace) -> None:
            name, _ = self._call(units[trace.name], run)
            self._row(name).overflows += trace.overflows
            self._count_flipped(units[trace.name], run, trace.codes.float())

        return list(self.network.run(inputs, observe).values())

    def _in_onnxruntime(self, inputs: dict[str, np.ndarray], run: TorchRun) -> list[np.ndarray]:
        """Run the file itself, and look at what its quantizers read."""
        if self._session is None:
            self._session, self._seen = observed_session(self.file, self.network.units)
        count = len(self.file.outputs)
        names = [*self.file.outputs, *self._seen]
        try:
            found = self._session.run(names, inputs)
        except Exception as error:  # the classes of its errors are private
            raise ValueError(f"onnxruntime: {error}") from error
        seen = dict(inputs) | dict(zip(self._seen, found[count:], strict=True))
        for unit in self.network.units:
            if unit.quantizer.source in seen:
                x = torch.from_numpy(np.array(seen[unit.quantizer.source])).float()
                self._count_flipped(unit, run, unit.quantizer.codes(x))
        return list(found[:count])

    def _count_flipped(self, unit: Unit, run: TorchRun, codes: torch.Tensor) -> None:
        name, call = self._call(unit, run)
        if call is None or name not in self.layers or codes.numel() != call.x.numel():
            return
        module = self.layers[name].module
        wanted = torch_codes(module.input_quantizer, call.x, module.deploy_grid)
        row = self._row(name)
        row.flipped = (row.flipped or 0) + int((codes.reshape(wanted.shape) != wanted).sum())

    def _before(self, tensor: str) -> list[ExpectedLayer]:
        names = [self.called[unit.name][0] for unit in self.network.units_before(tensor)]
        return [self.layers[name] for name in names if name in self.layers]

    def _call(self, unit: Unit, run: TorchRun) -> tuple[str, Call | None]:
        name, number = self.called[unit.name]
        calls = run.calls.get(name, [])
        return name, calls[number] if number < len(calls) else None

    def _row(self, name: str) -> Row:
        return self.rows.setdefault(name, Row())

    def _fault(self, name: str, text: str) -> None:
        faults = self.faults.setdefault(name, [])
        if text not in faults:
            faults.append(text)
