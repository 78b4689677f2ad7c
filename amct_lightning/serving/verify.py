"""Running a model and the checkpoint that was written of it side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning.graph.forward import InputData
from amct_lightning.modules.grid.codes import activation_codes
from amct_lightning.modules.layers import QATLayer
from amct_lightning.quantizers.base import Quantizer
from amct_lightning.serving.load import loaded, put_into
from amct_lightning.serving.model import ServedModel, served_model
from amct_lightning.serving.read import read_checkpoint
from amct_lightning.serving.report import ServedDeparture, ServedLayerReport, ServedLogits, ServingReport
from amct_lightning.serving.server import ServerLinear
from amct_lightning.serving.source import CONFIG
from amct_lightning.serving.tensors import entries, served_type


class _Row:
    """What is counted of a layer."""

    def __init__(self) -> None:
        self.codes = self.codes_wrong = self.outputs = self.outputs_wrong = 0
        self.largest = 0.0

    def add(self, layer: QATLayer, server: ServerLinear, x: Tensor, output: Tensor) -> None:
        """Count what the server's layer makes of the input of the model's layer."""
        if layer.serving is not None:
            quantizer = layer.input_quantizer
            codes = activation_codes(quantizer, x, *quantizer.usable_clips()).values + quantizer.offset
            theirs: Any = server.codes(x)
            self.codes += codes.numel()
            self.codes_wrong += int((codes != theirs).sum())
        found = server(x).float()
        difference = (found - output.float()).abs()
        allowed = 0.0 if layer.serving is not None else _rounding(server, x)
        self.outputs += difference.numel()
        self.outputs_wrong += difference.numel() - int((difference <= allowed).sum())
        self.largest = max(self.largest, float(difference.max())) if difference.numel() else self.largest


def compare(model: nn.Module, folder: str | Path, batches: Iterable[InputData]) -> ServingReport:
    """Run both, see :func:`amct_lightning.verify_serving`."""
    served = _in_its_dtype(served_model(model))
    ours = served.network
    has_config = served.config is not None and (Path(folder).expanduser() / CONFIG).is_file()
    theirs = loaded(folder, None if has_config else ours).to(next(ours.parameters()).device)
    rows = {name: _Row() for name in served.layers}
    order: dict[str, int] = {}
    logits, count = _Logits(), 0
    with torch.no_grad(), _evaluated(ours), _watched(ours, theirs, served.layers, rows, order):
        for batch in batches:
            logits.add(_run(ours, batch), _run(theirs, batch))
            count += 1
    if not count:
        raise ValueError("verify_serving got no batches. Give what the model is called with, for example [tokens].")
    departures = {name: _differing(tensors) for name, tensors in _other_tensors(served, folder).items()}
    layers = {name: _report(name, served.layers[name], row) for name, row in rows.items() if row.outputs}
    departures |= {name: report.fault for name, report in layers.items() if report.fault is not None}
    in_order = sorted(departures, key=lambda name: order.get(name, len(order)))
    found = [ServedDeparture(name, departures[name]) for name in in_order]
    exact = all(report.kind == "W8A8" for report in layers.values())
    if not found and exact and logits.largest > 0:
        found = [ServedDeparture("", "its float parts compute something else than those of the model")]
    run = sorted(layers, key=lambda name: order[name])
    name = str(served.dtype).removeprefix("torch.")
    return ServingReport(str(folder), name, count, tuple(layers[n] for n in run), logits.report(), tuple(found))


def _run(network: nn.Module, batch: InputData) -> Any:
    if isinstance(batch, Mapping):
        return network(**batch)
    return network(*batch) if isinstance(batch, tuple) else network(batch)


class _Logits:
    """The outputs of both networks."""

    def __init__(self) -> None:
        self.rows = self.equal = self.same_top = 0
        self.largest = 0.0

    def add(self, ours: Any, theirs: Any) -> None:
        """Compare the scores that they give."""
        first, second = _scores(ours).float(), _scores(theirs).float()
        first, second = first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])
        self.rows += len(first)
        self.equal += int((first == second).all(-1).sum())
        self.same_top += int((first.argmax(-1) == second.argmax(-1)).sum())
        self.largest = max(self.largest, float((first - second).abs().max()))

    def report(self) -> ServedLogits:
        """Return what was counted."""
        return ServedLogits(self.rows, self.equal, self.same_top, self.largest)


def _scores(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return _scores(output["logits"])
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise ValueError(f"The model returns a {type(output).__name__} without a tensor of scores, so nothing is compared.")


def _in_its_dtype(served: ServedModel) -> ServedModel:
    """Return the network in the dtype of the server, for its float parts compute in that as well."""
    if all(layer.weight.dtype == served.dtype for layer in served.layers.values()):
        return served
    copied = served_model(copy.deepcopy(served.network))  # its integers come from the weights as they are
    for module in copied.network.modules():
        if not isinstance(module, (QATLayer, Quantizer)):
            put_into(module, served.dtype, buffers=False)
    return copied


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _watched(
    ours: nn.Module,
    theirs: nn.Module,
    layers: Mapping[str, QATLayer],
    rows: Mapping[str, _Row],
    order: dict[str, int],
) -> Iterator[None]:
    """Compare each layer when it runs, and note in which order the modules do."""
    servers = {name: module for name, module in theirs.named_modules() if isinstance(module, ServerLinear)}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            order.setdefault(name, len(order))
            if name in rows and name in servers:
                rows[name].add(layers[name], servers[name], args[0], output)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in ours.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _other_tensors(served: ServedModel, folder: str | Path) -> dict[str, list[str]]:
    """Return the tensors of the checkpoint that are not the model's, by the modules they are of."""
    checkpoint, found = read_checkpoint(folder), dict[str, list[str]]()
    for name, _, value in entries(served.network, served.dtype):
        theirs = checkpoint.tensors.get(name)
        if theirs is None or theirs.dtype != value.dtype or not torch.equal(theirs, value.cpu()):
            module, _, own = name.rpartition(".")
            found.setdefault(module, []).append(own)
    return found


def _differing(tensors: list[str]) -> str:
    return f"{', '.join(tensors)} in the checkpoint {'is' if len(tensors) == 1 else 'are'} not what the model has"


def _report(name: str, layer: QATLayer, row: _Row) -> ServedLayerReport:
    return ServedLayerReport(
        name, served_type(layer), row.codes, row.codes_wrong, row.outputs, row.outputs_wrong, row.largest
    )


def _rounding(server: ServerLinear, x: Tensor) -> Tensor:
    """Return by how much the output may differ: each product and each sum is rounded to the dtype once or twice."""
    scale: Any = server.weight_scale
    weight: Any = server.weight
    added: Any = server.bias
    bias = None if added is None else added.float().abs()
    largest = nn.functional.linear(x.float().abs(), (weight.float() * scale).abs(), bias)
    return 4 * torch.finfo(server.dtype).eps * largest
