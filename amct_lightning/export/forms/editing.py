"""Putting nodes into the place of the one that stands for a quantized layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from amct_lightning.export.numbers import Array, LayerNumbers
from amct_lightning.export.tracing.placeholder import LayerCall


@dataclass
class Editor:
    """Makes nodes and constants, each in front of the node that is being replaced.

    Attributes:
        model: The graph.
        at: The node that is being replaced.
        opset: Opset of the model.
        merged: What several layers have in common, such as the quantization of a tensor that all of them read.
    """

    model: ir.Model
    at: ir.Node
    opset: int
    merged: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Put a node in front of the one that is being replaced.

        Args:
            operator: Its operator, of the default domain.
            inputs: Its inputs; ``None`` for one that is left out.
            name: Its name.
            attributes: Its attributes.
            outputs: The number of its outputs, which are called ``<name>.output0`` and so on.

        Returns:
            Its outputs.
        """
        made = ir.Node(
            "",
            operator,
            list(inputs),
            [_attribute(key, value) for key, value in (attributes or {}).items()],
            outputs=[ir.Value(name=f"{name}.output{position}") for position in range(outputs)],
            name=name,
        )
        graph = self.at.graph
        assert graph is not None
        graph.insert_before(self.at, made)
        return list(made.outputs)

    def initializer(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a constant to the model, or return the one of that name.

        Args:
            name: Its name.
            array: Its value.
            dtype: Its type, if it is not that of the array.
        """
        known = self.model.graph.initializers.get(name)
        if known is not None:
            return known
        contiguous = array if array.flags.c_contiguous else np.ascontiguousarray(array)  # which has no 0-d arrays
        tensor = ir.tensor(contiguous, dtype=dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        """Put a Constant node at the beginning of the model, or return the output of the one of that name."""
        key = ("constant", name)
        if key not in self.merged:
            made = ir.Node(
                "",
                "Constant",
                [],
                [ir.AttrTensor("value", ir.tensor(array))],
                outputs=[ir.Value(name=f"{name}.output0")],
                name=name,
            )
            graph = self.model.graph
            graph.insert_before(graph[0], made)
            self.merged[key] = made.outputs[0]
        return self.merged[key]


def _attribute(name: str, value: Any) -> ir.Attr:
    return value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(name, value)


@dataclass(frozen=True)
class Site:
    """Where a quantized layer is called in the graph.

    Attributes:
        call: The call.
        numbers: The numbers of the layer.
        name: What its nodes are named by: the layer's name; from its second call on with the number of the call.
        inputs: The input, and for recurrent layers the initial state.
        edit: Makes the nodes.
    """

    call: LayerCall
    numbers: LayerNumbers
    name: str
    inputs: tuple[ir.Value, ...]
    edit: Editor

    @property
    def layer(self) -> Any:
        """The layer."""
        return self.call.layer

    @property
    def weight_name(self) -> str:
        """What AMCT calls the weight."""
        return f"{self.numbers.name}.sub_module.weight"

    @property
    def bias_name(self) -> str:
        """What AMCT calls the bias."""
        return f"{self.numbers.name}.sub_module.bias"
