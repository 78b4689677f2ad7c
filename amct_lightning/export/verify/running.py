"""What is counted of a layer, and what runs a file beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx

from amct_lightning.export.integer.graph_file import GraphFile
from amct_lightning.export.integer.segments import session
from amct_lightning.export.integer.units import IntegerLayer, Unit
from amct_lightning.export.verify.expected import ExpectedLayer
from amct_lightning.export.verify.report import LayerReport
from amct_lightning.export.verify.torch_side import Call


class Row:
    """What is counted of a layer."""

    def __init__(self) -> None:
        self.input_difference: float | None = None
        self.codes = self.ties = self.wrong = self.outputs = self.outputs_wrong = self.overflows = 0
        self.largest = 0.0
        self.flipped: int | None = None

    def report(self, name: str, expected: ExpectedLayer | None, faults: Iterable[str]) -> LayerReport:
        """Return the row of the report.

        Args:
            name: Name of the layer.
            expected: The layer of the model, if it is one.
            faults: What is wrong with it.
        """
        products = [] if expected is None else [expected.input, *([expected.hidden] if expected.hidden else [])]
        return LayerReport(
            name,
            self.input_difference,
            self.codes,
            self.ties,
            self.wrong,
            self.outputs,
            self.outputs_wrong,
            self.largest,
            self.flipped,
            sum(int(product.flips.sum()) for product in products),
            self.overflows,
            tuple(faults),
        )


def made_by_model(
    unit: Unit, arrays: dict[str, np.ndarray], call: Call, expected: ExpectedLayer | None
) -> dict[str, np.ndarray]:
    """Return the model's output of a layer as the tensors that the file's layer makes.

    Args:
        unit: The layer of the file.
        arrays: What that reads.
        call: What the layer of the model had and gave.
        expected: That layer.
    """
    if not isinstance(unit, IntegerLayer):
        parts = (call.y.unsqueeze(1), *call.last, call.last[-1])[:3]
        return {name: part.numpy() for name, part in zip(unit.outputs, parts, strict=True) if name}
    y = call.y.numpy()
    x = arrays[unit.quantizer.source]
    if unit.kind in ("Gemm", "MatMul") and x.ndim != y.ndim:
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    if unit.float_bias is not None and (expected is None or expected.input.float_bias is None):
        # The model adds something of its own to the output of the layer, which the file adds at the same place.
        return {unit.dequantized: y, unit.output: y + unit.float_bias}
    return {unit.dequantized: y, unit.output: y}


def observed_session(file: GraphFile, units: Sequence[Unit]) -> tuple[Any, list[str]]:
    """Return a session of a file that also gives what the quantizers read, unless the file is large.

    Its numbers would be in memory three times meanwhile.

    Args:
        file: The graph of the file.
        units: Its quantized layers.

    Returns:
        The session, and the names of the tensors that it gives besides its outputs.
    """
    label = file.label
    made = {name for node in file.nodes for name in node.output} - set(file.outputs)
    wanted = [name for name in dict.fromkeys(unit.quantizer.source for unit in units) if name in made]
    if file.large and file.path is not None:
        return session(file.path, label), []
    model = onnx.ModelProto()
    model.CopyFrom(file.model if file.path is None else onnx.load(file.path))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    return session(model, label), wanted
