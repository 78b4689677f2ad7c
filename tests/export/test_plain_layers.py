"""Every layer type and width goes through torch's exporters: one node per quantizer, the same numbers."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, prepare_qat, quantized_layers
from tests.export.plain import Exported, assert_close, assert_equal, onnx_outputs, operators, quantizers
from tests.modules.cases import LAYERS, WIDTHS, LayerCase, Width, converted, fits

ALGORITHMS = ("arq_retrain", "ulq_retrain")
UNROLLED = 2
"""How often a recurrent layer quantizes its hidden state: once in each step, of which the cases get no more here."""


class AllLayers(nn.Module):
    """All cases side by side, so that one export is enough for them."""

    def __init__(self, cases: list[LayerCase]) -> None:
        super().__init__()
        self.hosts = nn.ModuleDict({case.name: case.model() for case in cases})

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(host(x) for host, x in zip(self.hosts.values(), inputs, strict=True))


def width_of(case: LayerCase, algo: str) -> Width:
    """Another width for each layer, of those that it can have."""
    fitting = [width for width in WIDTHS if width.algo == algo and fits(case, width)]
    return fitting[LAYERS.index(case) % len(fitting)]


def input_of(case: LayerCase) -> Tensor:
    x = case.input()
    return x.narrow(0 if case.time_first else 1, 0, UNROLLED) if case.recurrent else x


@cache
def all_layers(*algos: str) -> Exported:
    """All layers, which have the given algorithms by turns."""
    torch.manual_seed(0)
    model, args = AllLayers(LAYERS), tuple(map(input_of, LAYERS))
    layers = {}
    for case, algo in zip(LAYERS, itertools.cycle(algos), strict=False):
        layers |= width_of(case, algo).config(f"hosts.{case.name}.layer").layers
    converted = prepare_qat(model, RetrainConfig(layers=layers), args).train()
    converted(*args)  # calibrates
    return Exported(converted.eval(), args)


@pytest.fixture(params=ALGORITHMS)
def exported(request: pytest.FixtureRequest) -> Exported:
    return all_layers(request.param)


@pytest.fixture
def mixed() -> Exported:
    """Both algorithms in one network, for what takes long and sees the operators of the quantizers only."""
    return all_layers(*ALGORITHMS)


def test_the_exported_program_gives_the_same_bits(exported: Exported) -> None:
    assert len(quantized_layers(exported.model)) == len(LAYERS)
    program = exported.program.module()
    with torch.no_grad():
        assert_equal(list(program(*exported.args)), exported.eager())


def test_it_has_a_node_for_every_quantizer(exported: Exported) -> None:
    recurrent = sum(case.recurrent for case in LAYERS)
    activations, weights = len(LAYERS) + recurrent * UNROLLED, len(LAYERS) + recurrent
    assert quantizers(exported.program) == (activations, weights)


@pytest.mark.parametrize("case", [case for case in LAYERS if not case.recurrent], ids=lambda case: case.name)
def test_a_layer_is_three_nodes(case: LayerCase) -> None:
    qat = converted(case)
    counts = operators(torch.export.export(qat.model.eval(), (qat.x,)))
    assert list(counts.values()) == [1, 1, 1]


def test_decompositions_take_the_operators_away(mixed: Exported) -> None:
    program = mixed.program.run_decompositions()
    assert quantizers(program) == (0, 0)
    with torch.no_grad():
        assert_close(list(program.module()(*mixed.args)), mixed.eager())


def test_the_operators_stay_for_who_takes_them_out_of_the_decompositions(mixed: Exported) -> None:
    table = torch.export.default_decompositions()
    for operator in (torch.ops.amct_lightning.fake_quantize_activation, torch.ops.amct_lightning.fake_quantize_weight):
        del table[operator.default]
    assert quantizers(mixed.program.run_decompositions(table)) == quantizers(mixed.program)


def test_a_saved_program_gives_the_same_bits(exported: Exported) -> None:
    file = io.BytesIO()
    torch.export.save(exported.program, file)
    file.seek(0)
    with torch.no_grad():
        assert_equal(list(torch.export.load(file).module()(*exported.args)), exported.eager())


def pairs(found: list[Tensor], expected: list[Tensor]) -> Iterator[tuple[LayerCase, Tensor, Tensor]]:
    return zip(LAYERS, found, expected, strict=True)


def assert_onnxruntime_gives(exported: Exported, file: bytes) -> None:
    wrong = {}
    for case, one, other in pairs(onnx_outputs(file, *exported.args), exported.eager()):
        try:
            assert_close([one], [other])
        except AssertionError:
            wrong[case.name] = float((one - other).abs().max())
    assert not wrong


def test_onnxruntime_gives_the_same_numbers(mixed: Exported) -> None:
    assert_onnxruntime_gives(mixed, mixed.onnx)


def test_onnxruntime_gives_the_same_numbers_of_a_traced_graph(exported: Exported) -> None:
    assert_onnxruntime_gives(exported, exported.script_onnx)


@pytest.mark.parametrize("case", [LAYERS[2], LAYERS[9], LAYERS[14], LAYERS[-4]], ids=lambda case: case.name)
def test_a_strict_export_is_the_same_graph(case: LayerCase) -> None:
    qat = converted(case)
    qat.model.eval()
    strict, loose = (torch.export.export(qat.model, (qat.x,), strict=strict) for strict in (True, False))
    assert quantizers(strict) == quantizers(loose)
    with torch.no_grad():
        assert torch.equal(strict.module()(qat.x), qat.model(qat.x))
