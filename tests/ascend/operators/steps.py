"""The steps whose operators are traced: what a training does with every layer type, width and state, on one NPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning import QuantChoices, QuantRecord, RetrainConfig, prepare_qat
from amct_lightning.callbacks.monitor.layers import Drift, monitored_layers
from amct_lightning.callbacks.monitor.sampling import Sampler
from amct_lightning.callbacks.nonfinite import NonfiniteWatch
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig
from amct_lightning.modules import QATLayer, quantized_layers
from tests.ascend.operators.tracing import DeviceTrace
from tests.modules.cases import COMBINATIONS, LAYERS, LINEAR_INPUTS, WIDTHS, LayerCase, Width

NPU = "npu:0"
LAYER_TYPES = ("conv1d", "conv", "conv3d", "linear", "deconv1d", "deconv", "deconv3d", "lstm", "gru")
"""One case of each type that can be quantized, which goes through everything; the other cases through some of it."""
IMAGES = (2, 2, 6, 6)
SOME_WIDTHS = (Width(), Width(algo="ulq_retrain"))


@dataclass(frozen=True)
class Traces:
    """What the quantized models and the float ones have done."""

    quantized: DeviceTrace
    float: DeviceTrace


@functools.cache
def trace_everything() -> Traces:
    """Trace every layer type with every algorithm and width, and every state, option and precision."""
    traces = Traces(DeviceTrace(), DeviceTrace())
    for case in LAYERS:
        trace_float(traces.float, case.model(), case.input())
        for width in SOME_WIDTHS:
            trace_layer(traces.quantized, case, width)
        if case.name in LAYER_TYPES:
            _trace_type(traces.quantized, case)
    for model in (Branches(), Watched()):
        trace_float(traces.float, model, torch.randn(IMAGES))
    trace_options(traces.quantized)
    trace_watching(traces.quantized)
    return traces


def _trace_type(trace: DeviceTrace, case: LayerCase) -> None:
    for width in WIDTHS:
        if width not in SOME_WIDTHS and (case, width) in COMBINATIONS:
            trace_layer(trace, case, width, briefly=True)
    for width in LINEAR_INPUTS if case.name == "linear" else ():
        trace_layer(trace, case, width)
    for width in SOME_WIDTHS:
        trace_states(trace, case, width)
    for dtype in (torch.bfloat16, torch.float16):
        trace_half(trace, case, dtype)


class Steps:
    """A model with its optimizer on the device, whose steps are traced.

    Args:
        trace: Takes the operators; it is entered for the steps only.
        model: The model, on the CPU.
        x: An input for it.
        optimizer: Makes an optimizer.
    """

    def __init__(
        self,
        trace: DeviceTrace,
        model: nn.Module,
        x: Tensor,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        self.trace = trace
        self.model = model.to(NPU).train()
        self.x = x.to(NPU)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3)
        self.watch = NonfiniteWatch(self.model, 1000, "warn")

    def train(self, forward: str = "forward", context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """One training step; the operators of its forward belong to the phase given."""
        with self.trace:
            self.optimizer.zero_grad()
            with self.trace.during(forward), context():
                loss = self.model(self.x).square().mean()
            with self.trace.during("backward"):
                loss.backward()
            with self.trace.during("optimizer"):
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
            with self.trace.during("after the step"):
                self.watch.start_batch(0)
                self.watch.end_batch()

    @torch.no_grad()
    def evaluate(self, phase: str = "evaluation") -> None:
        """One evaluation batch."""
        self.model.eval()
        with self.trace, self.trace.during(phase):
            self.model(self.x)
        self.model.train()

    @property
    def layers(self) -> list[QATLayer]:
        return list(quantized_layers(self.model).values())  # type: ignore[arg-type]


def trace_layer(trace: DeviceTrace, case: LayerCase, width: Width, briefly: bool = False) -> None:
    """Take a layer through calibration and learning, and if not briefly also through freezing and recalibration."""
    torch.manual_seed(0)
    x = case.input()
    optimizer = torch.optim.AdamW if width.learned else _sgd
    steps = Steps(trace, prepare_qat(case.model(), width.config(), x), x, optimizer)
    steps.train("calibration")
    steps.train()
    if briefly:
        return
    steps.evaluate()
    with trace, trace.during("schedule"):
        _freeze(steps.layers)
    steps.train("frozen")
    with trace, trace.during("schedule"):
        _thaw_and_recalibrate(steps.layers)
    steps.train("calibration")


def trace_states(trace: DeviceTrace, case: LayerCase, width: Width) -> None:
    """Run a layer in float before its start, observed or not, and under mixed precision."""
    torch.manual_seed(0)
    x = case.input()
    steps = Steps(trace, prepare_qat(case.model(), width.config(), x), x)
    steps.evaluate()  # without ranges
    for mode in ("float", "observe"):
        for layer in steps.layers:
            layer.quant_mode = mode  # type: ignore[assignment]
        steps.train("before the start")
    for layer in steps.layers:
        layer.quant_mode = "quantized"
    steps.train("forward, bf16-mixed", lambda: torch.autocast("npu", torch.bfloat16))


def trace_float(trace: DeviceTrace, model: nn.Module, x: Tensor) -> None:
    """The same steps of a float model."""
    steps = Steps(trace, model, x, _sgd if isinstance(model, Watched) else torch.optim.AdamW)
    steps.train()
    steps.train("forward, bf16-mixed", lambda: torch.autocast("npu", torch.bfloat16))
    steps.evaluate()


def trace_half(trace: DeviceTrace, case: LayerCase, dtype: torch.dtype) -> None:
    """A step of a model whose parameters are in half precision."""
    torch.manual_seed(0)
    x = case.input()
    steps = Steps(trace, prepare_qat(case.model(), Width().config(), x).to(dtype), x.to(dtype))
    steps.train("calibration")
    steps.train("forward, half precision")


class Branches(nn.Module):
    """conv - bn - relu, two readers of one tensor, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.twice(self.twice((self.left(x) + self.right(x)).flatten(2)))


def trace_watching(trace: DeviceTrace) -> None:
    """A step that a QuantMonitor looks at, the end of its interval, and the record of a checkpoint."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES)
    steps = Steps(trace, prepare_qat(Watched(), None, x), x)
    steps.train("calibration")
    rows, drift = monitored_layers(steps.model), Drift()
    sampler = Sampler(rows, torch.device(NPU))
    with trace, trace.during("calibration"):
        drift.note(rows)
    sampler.attach()
    steps.train("step of a monitor")
    sampler.detach()
    with trace, trace.during("logging interval"):
        sampler.collect(drift, distributed=False)
        steps.watch.check()
    with trace, trace.during("record of a checkpoint"):
        QuantRecord.from_model(steps.model)


class Watched(nn.Module):
    """A convolution with BatchNorm and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.stem(x).flatten(2).movedim(1, 2))[0]


def trace_options(trace: DeviceTrace) -> None:
    """Every option: several calibration batches, given ranges, FORCE_FP16_QUANT, allow_reuse, search_n, deploy_grid."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES)
    for force in ("DEFAULT", "FORCE_FP16_QUANT"):
        default = RetrainConfig.default(Branches(), x)
        config = replace(default, batch_num=2, fakequant_precision_mode=force)
        steps = Steps(trace, prepare_qat(Branches(), config, x, allow_reuse=True, search_n=True), x)
        steps.train("calibration")
        steps.train("calibration")
        steps.train()
        steps.evaluate("search of the shifts")
        steps.evaluate("search of the shifts")
    learned = LayerConfig(
        retrain_data_config=DataConfig(dst_type="INT16"), retrain_weight_config=WeightConfig("ulq_retrain")
    )
    for choices in (QuantChoices(), QuantChoices(defaults=learned)):
        steps = Steps(trace, prepare_qat(Watched(), choices, x, deploy_grid=True), x)
        steps.train("calibration")
        steps.train("forward, deploy_grid")
        steps.train("forward, deploy_grid", lambda: torch.autocast("npu", torch.bfloat16))
        steps.evaluate("evaluation, deploy_grid")
    trace_served(trace)
    given = LayerConfig(retrain_data_config=DataConfig(clip_max=2.0, clip_min=-2.0, fixed_min=True))
    host = nn.Sequential(nn.Linear(4, 3))
    Steps(trace, prepare_qat(host, RetrainConfig(layers={"0": given}), torch.ones(2, 4)), torch.ones(2, 4)).train()


def trace_served(trace: DeviceTrace) -> None:
    """Steps of a network for servers: float32 with and without autocast, and the half precisions."""
    x = torch.randn(2, 3, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for symmetric in (False, True):
            net = nn.Sequential(nn.Linear(8, 600), nn.ReLU(), nn.Linear(600, 4)).to(dtype)
            choices = {"activations": {"symmetric": symmetric}}
            steps = Steps(trace, prepare_qat(net, choices, x.to(dtype), target="serving"), x.to(dtype))
            steps.train("calibration")
            steps.train("forward, target serving")
            if dtype == torch.float32:
                steps.train("forward, target serving", lambda: torch.autocast("npu", torch.bfloat16))
            steps.evaluate("evaluation, target serving")


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1)


def _freeze(layers: list[QATLayer]) -> None:
    for layer in layers:
        for name in layer.activation_quantizers:
            layer.get_quantizer(name).freeze()
        for name, parameter in layer.weight_quantizers.items():
            getattr(layer, name).freeze(getattr(layer, parameter))


def _thaw_and_recalibrate(layers: list[QATLayer]) -> None:
    for layer in layers:
        for name in layer.activation_quantizers:
            layer.get_quantizer(name).freeze(False)
            layer.get_quantizer(name).recalibrate()
        for name in layer.weight_quantizers:
            getattr(layer, name).unfreeze()
