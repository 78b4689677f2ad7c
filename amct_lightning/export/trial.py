"""Trying a graph out before it is taken: torch's exporters now and then write one that does not run, or not so."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from amct_lightning.export.forms import write_form
from amct_lightning.export.numbers import Array
from amct_lightning.export.tracing.base_graph import BaseGraph
from amct_lightning.export.tracing.prepared import Prepared
from amct_lightning.export.tracing.signature import FlatCall, on_cpu
from amct_lightning.export.write import check_network
from amct_lightning.graph.forward import InputData
from amct_lightning.graph.preserve import preserved

_OTHER = 0.5
"""Relative difference from which on an output is another one. Codes that are rounded the other way make less."""

_LARGEST = 2**31 - 2**20  # bytes of a network that can be tried without a file of its own


@dataclass(frozen=True)
class RunsAsTrained:
    """Checks a graph: ONNX's checker, and where onnxruntime is installed, a run on the input that it was made with.

    Attributes:
        prepared: The model.
        inputs: The tensors of the input.
        expected: What the model makes of them.
    """

    prepared: Prepared
    inputs: list[Array]
    expected: list[Array]

    @classmethod
    def of(cls, prepared: Prepared, input_data: InputData) -> RunsAsTrained:
        """Run a model in torch.

        Args:
            prepared: The model.
            input_data: The input.
        """
        call = FlatCall(prepared.model, on_cpu(input_data)).eval()
        with preserved(prepared.model):
            outputs = call(*call.tensors)
        return cls(prepared, [tensor.numpy() for tensor in call.tensors], [output.numpy() for output in outputs])

    def __call__(self, graph: BaseGraph) -> None:
        """Raise an error if the graph cannot be taken.

        Args:
            graph: The graph.

        Raises:
            RuntimeError: If its outputs are others than the model's.
            Exception: Those of the checker and of onnxruntime.
        """
        model = write_form(graph, self.prepared, "fake_quant")
        proto = ir.to_proto(model)
        if proto.ByteSize() > _LARGEST:
            return
        check_network(proto)
        if importlib.util.find_spec("onnxruntime") is None:
            return
        names = [str(value.name) for value in model.graph.inputs]
        outputs = _run(proto.SerializeToString(), dict(zip(names, self.inputs, strict=True)))
        for value, found, wanted in zip(model.graph.outputs, outputs, self.expected, strict=True):
            _compare(str(value.name), found, wanted)


def _run(network: bytes, inputs: dict[str, Array]) -> list[Array]:
    onnxruntime: Any = importlib.import_module("onnxruntime")  # it may not be installed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session: Any = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    return list(session.run(None, {name: value for name, value in inputs.items() if name in wanted}))


def _compare(name: str, found: Array, wanted: Array) -> None:
    if found.shape != wanted.shape:
        raise RuntimeError(f"output '{name}' has shape {found.shape} in onnxruntime and {wanted.shape} in torch")
    if not np.issubdtype(wanted.dtype, np.floating):
        return
    finite = np.isfinite(wanted)
    size, difference = np.linalg.norm(wanted[finite]), np.linalg.norm((found - wanted)[finite])
    if not difference <= _OTHER * max(size, np.finfo(np.float32).tiny):
        raise RuntimeError(
            f"output '{name}' is another one in onnxruntime: it differs by {difference / size:.2g} of its size"
        )
