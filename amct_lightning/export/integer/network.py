"""A file with quantized layers, run on the CPU: they in integer arithmetic, what is between them by onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from amct_lightning.export.integer.arithmetic import check_bits
from amct_lightning.export.integer.compute import Observe, layer_outputs, recurrent_outputs
from amct_lightning.export.integer.deploy_form import DeployReader, FormReader
from amct_lightning.export.integer.graph_file import GraphFile, Source, read_by
from amct_lightning.export.integer.segments import Arrays, Segment, check_inputs
from amct_lightning.export.integer.units import IntegerLayer, LayerTrace, Unit, as_tensor

Compute = Callable[[Unit, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""From a quantized layer and the float tensors that it reads to those that it makes."""


class QuantizedNetwork:
    """A graph whose quantized layers are known.

    Args:
        reader: What has read them.

    Attributes:
        file: The graph.
        units: The quantized layers in the order of the file.
    """

    def __init__(self, reader: FormReader) -> None:
        self.file = reader.file
        self.units = reader.units
        self._nodes = [node for node in self.file.nodes if id(node) not in reader.taken]
        self._level = self._levels()
        self._segments, self._units_at = self._cut()
        read = {name for node in self._nodes for name in read_by(node)}
        self.file.release(read.union(self.file.outputs, *(unit.reads for unit in self.units)))

    def compute(self, inputs: Arrays, compute: Compute) -> dict[str, np.ndarray]:
        """Compute the outputs of the graph.

        Args:
            inputs: Input name -> numbers.
            compute: Computes the quantized layers.

        Returns:
            Output name -> numbers.

        Raises:
            ValueError: If inputs do not fit, or something cannot be computed with them.
        """
        arrays: dict[str, np.ndarray] = check_inputs(self.file, inputs)
        for level, (segment, units) in enumerate(zip(self._segments, self._units_at, strict=True)):
            arrays |= segment.run(arrays)
            for unit in units:
                arrays |= compute(unit, {name: self._array(name, arrays) for name in unit.reads})
            for name in [name for name in arrays if self._last_read.get(name, 0) <= level]:
                del arrays[name]
        return {name: self._array(name, arrays) for name in self.file.outputs}

    def units_before(self, tensor: str) -> list[Unit]:
        """Return the quantized layers from which a tensor is computed with no other one in between."""
        makers = {name: unit for unit in self.units for name in unit.makes}
        found: dict[str, Unit] = {}
        seen: set[str] = set()
        open_ = [tensor]
        while open_:
            name = open_.pop()
            if name in seen:
                continue
            seen.add(name)
            maker = self.file.maker(name)
            if name in makers:
                found[makers[name].name] = makers[name]
            elif maker is not None:
                open_ += read_by(maker)
        return [unit for unit in self.units if unit.name in found]

    def _array(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        found = arrays.get(name)
        fixed = self.file.constant(name) if found is None else found
        assert fixed is not None, name
        return fixed

    def _levels(self) -> dict[str, int]:
        """Say for every tensor how many quantized layers are before it, on the longest path."""
        level: dict[str, int] = {}
        units = {name: unit for unit in self.units for name in unit.makes}
        # The tensors that a unit makes have other makers in the file, the nodes that belong to it.
        for node in self.file.nodes:
            for name in node.output:
                unit = units.get(name)
                if unit is not None:
                    level[name] = 1 + max((level.get(read, 0) for read in unit.reads), default=0)
                else:
                    level[name] = max((level.get(read, 0) for read in read_by(node)), default=0)
        return level

    def _cut(self) -> tuple[list[Segment], list[list[Unit]]]:
        at = [max((self._level.get(name, 0) for name in unit.reads), default=0) for unit in self.units]
        own = [max((self._level[name] for name in node.output if name), default=0) for node in self._nodes]
        count = 1 + max([*at, *own], default=0)
        reads = Counter[str](self.file.outputs)
        self._last_read = dict.fromkeys(self.file.outputs, count)
        for level, names in [(level, unit.reads) for level, unit in zip(at, self.units, strict=True)] + [
            (level, tuple(read_by(node))) for level, node in zip(own, self._nodes, strict=True)
        ]:
            reads.update(names)
            for name in names:
                self._last_read[name] = max(level, self._last_read.get(name, 0))
        segments = []
        for level in range(count):
            nodes = [node for node, found in zip(self._nodes, own, strict=True) if found == level]
            inside = Counter(name for node in nodes for name in read_by(node))
            wanted = [name for node in nodes for name in node.output if reads[name] > inside[name]]
            segments.append(Segment(self.file, nodes, wanted))
        units = [[unit for unit, found in zip(self.units, at, strict=True) if found == level] for level in range(count)]
        return segments, units


class DeployedNetwork(QuantizedNetwork):
    """A deploy model, run to the bit as the device runs it.

    AscendQuant multiplies by the float32 reciprocal that stands in the file; the layers compute with the codes less
    their offset, so that padding is the real value 0; the sums are exact and wrap around at 32 bits; the device keeps
    19 bits of the scale by which it multiplies them. What is between the layers is computed in float32 by onnxruntime.

    Args:
        source: The file, or the model read from it.
        deq_bits: 19, or 32 to compute with the whole dequantization scale, for comparison.
        output_dtype: What AscendDequant puts out: ``"float32"``, or ``"float16"`` rounded to that.

    Attributes:
        overflows: Layer name -> how many sums of the last run left the range of int32; the others had none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX file, or has a node that is not known.

    Example:
        >>> import tempfile
        >>> from onnx import TensorProto, helper, numpy_helper
        >>> nodes = [
        ...     helper.make_node("AscendQuant", ["x"], ["q"], name="fc.quant", scale=2.0, offset=1.0, dst_type="INT8"),
        ...     helper.make_node("MatMul", ["q", "w"], ["s"], name="fc"),
        ...     helper.make_node("AscendDequant", ["s", "p"], ["y"], name="fc.dequant", dtype=0),
        ... ]
        >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy")
        >>> half = np.array([np.float32(0.5).view(np.uint32)], dtype=np.uint64)
        >>> w, p = numpy_helper.from_array(np.array([[3]], np.int8), "w"), numpy_helper.from_array(half, "p")
        >>> model = helper.make_model(helper.make_graph(nodes, "net", [x], [y], [w, p]))
        >>> run_deployed(model, {"x": np.array([[1.2]], np.float32)})
        {'y': array([[3.]], dtype=float32)}
    """

    def __init__(
        self, source: Source | GraphFile, *, deq_bits: int = 19, output_dtype: Literal["float32", "float16"] = "float32"
    ) -> None:
        check_bits(deq_bits)
        if output_dtype not in ("float32", "float16"):
            raise ValueError(f"output_dtype is {output_dtype!r}, it must be 'float32' or 'float16'.")
        reader = DeployReader(source if isinstance(source, GraphFile) else GraphFile(source))
        reader.read()
        super().__init__(reader)
        self.deq_bits = deq_bits
        self.dtype = torch.float32 if output_dtype == "float32" else torch.float16
        self.overflows: dict[str, int] = {}

    @torch.no_grad()
    def run(self, inputs: Arrays, observe: Observe | None = None) -> dict[str, np.ndarray]:
        """Run the network.

        Args:
            inputs: Input name -> numbers.
            observe: Is given what every quantized layer computed.

        Returns:
            Output name -> numbers.

        Raises:
            ValueError: If names or shapes of the inputs do not fit, or a layer cannot be computed.
        """
        self.overflows = {}

        def compute(unit: Unit, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            tensors = [as_tensor(arrays[name]) for name in unit.reads]
            trace, made = run_unit(unit, tensors, self.deq_bits, self.dtype)
            if trace.overflows:
                self.overflows[unit.name] = trace.overflows
            if observe is not None:
                observe(trace)
            return made

        return self.compute(inputs, compute)


def run_unit(
    unit: Unit, tensors: Sequence[Tensor], deq_bits: int = 19, dtype: torch.dtype = torch.float32
) -> tuple[LayerTrace, dict[str, np.ndarray]]:
    """Compute one quantized layer.

    Args:
        unit: The layer.
        tensors: The float tensors that it reads.
        deq_bits: How many bits of the dequantization scale count.
        dtype: What the device puts out.

    Returns:
        What it computed, and the tensors that it makes.
    """
    if isinstance(unit, IntegerLayer):
        trace, (before, after) = layer_outputs(unit, unit.quantizer.codes(tensors[0]), deq_bits, dtype)
        return trace, {unit.dequantized: before.numpy(), unit.output: after.numpy()}
    given = dict(zip(unit.reads, tensors, strict=True))
    state = [given.get(unit.hidden_quantizer.source), given.get(unit.initial_cell)]
    trace, outputs = recurrent_outputs(unit, given[unit.quantizer.source], state, deq_bits, dtype)
    return trace, {name: value.numpy() for name, value in zip(unit.outputs, outputs, strict=True) if name}


def run_deployed(
    source: Source,
    inputs: Arrays,
    *,
    deq_bits: int = 19,
    output_dtype: Literal["float32", "float16"] = "float32",
) -> dict[str, np.ndarray]:
    """Run a deploy model once, to the bit as the device runs it; see :class:`DeployedNetwork`.

    Args:
        source: The file, or the model read from it.
        inputs: Input name -> numbers.
        deq_bits: 19, or 32 for comparison.
        output_dtype: ``"float32"`` or ``"float16"``.

    Returns:
        Output name -> numbers.
    """
    return DeployedNetwork(source, deq_bits=deq_bits, output_dtype=output_dtype).run(inputs)
