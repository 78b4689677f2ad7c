"""A fault planted anywhere in a recorded export is found and the layer named; without one the export is right."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, ValueInfoProto, helper
from torch import nn

from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.tracing.signature import input_tensors
from amct_lightning.export.verify.expected import ExpectedLayer, expected_layer
from amct_lightning.export.verify.form import FormVerification
from amct_lightning.export.verify.report import FormReport
from amct_lightning.export.verify.torch_side import TorchRun, run_model
from amct_lightning.record import QuantRecord
from tests.export.golden_files import EXPORTED, RECURRENT, golden_case, golden_inputs, golden_model
from tests.export.verify import faults
from tests.export.verify.qdq_files import QDQ_CASES, qdq_model
from tests.test_migrate import migrated

CASES = [name for name in EXPORTED if name != "cnn_bn_relu__fp16_mode_cfg"]
"""AMCT ignores that it was told to round scales to float16; this package does it."""


@cache
def trained(case: str) -> nn.Module:
    """The model that AMCT has exported: of recurrent layers it exports the biases from before the training."""
    if case not in RECURRENT:
        return migrated(case)
    model = copy.deepcopy(migrated(case))
    for name in ("bias_ih_l0", "bias_hh_l0"):
        stale = golden_case(case).tensors[f"final/rnn.quant_module.replaced_module.{name}"]
        getattr(model.rnn, name).data.copy_(stale)
    return model


@cache
def side_of_torch(case: str) -> tuple[Any, dict[str, ExpectedLayer], TorchRun]:
    model = trained(case)
    root, plan = find_plan(model)
    record = QuantRecord.from_model(model)
    layers = {layer.name: expected_layer(root, layer, record[layer.name]) for layer in plan.layers}
    batch = golden_case(case).group("eval_x/")
    with torch.no_grad():
        return input_tensors(model, batch), layers, run_model(model, layers, batch)


def verified(case: str, form: str, model: ModelProto, until_found: bool = False) -> FormReport:
    """What is found on the recorded batch; to save time, nothing is run if the numbers alone show a fault."""
    batch, layers, run = side_of_torch(case)
    found = FormVerification(form, model, layers, 19)
    if not (until_found and found.faults):
        found.add(batch, run)
    return found.report(list(run.calls))


def learn_ranks(case: str) -> None:
    """Have the number of axes of all tensors at hand for the faults: by name they are alike in both forms."""
    known: dict[str, int] = {}
    for form in ("fake_quant", "deploy"):
        model = golden_model(case, form)
        if form == "fake_quant":
            shown = golden_model(case, form)
            names = [name for item in shown.graph.node if item.op_type != "Constant" for name in item.output if name]
            del shown.graph.output[:]
            shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
            session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
            inputs = golden_inputs(case, shown)
            values = inputs | dict(zip(names, session.run(None, inputs), strict=True))
            known = {name: np.ndim(value) for name, value in values.items()}
        for item in model.graph.node:
            for name in item.output:
                source = item.input[0] if item.op_type in ("AscendQuant", "AscendDequant") else None
                if source is not None:
                    known.setdefault(name, known[source])
    faults.remember_ranks(golden_model(case, "deploy"), known)


@pytest.mark.parametrize("form", ["deploy", "fake_quant"])
@pytest.mark.parametrize("case", CASES)
class TestRecordedExports:
    def test_compute_what_the_model_does(self, case: str, form: str) -> None:
        report = verified(case, form, golden_model(case, form))
        assert [str(departure) for departure in report.departures] == []
        assert [row.layer for row in report.layers] == list(side_of_torch(case)[2].calls)
        assert all(row.codes and not row.codes_wrong for row in report.layers)
        assert all(row.outputs for row in report.layers if form == "deploy" or row.layer != "rnn")
        (output,) = report.outputs
        assert output.same_top + output.ties == output.rows

    def test_with_one_fault_in_any_layer_have_it_found_and_named(self, case: str, form: str) -> None:
        learn_ranks(case)
        model = golden_model(case, form)
        planted = list((faults.deploy_faults if form == "deploy" else faults.fake_quant_faults)(model))
        assert {layer for layer, _, _ in planted} == set(faults.layers(model))
        missed = []
        for layer, what, plant in planted:
            broken = golden_model(case, form)
            plant(broken)
            try:
                found = [departure.layer for departure in verified(case, form, broken, until_found=True).departures]
            except ValueError as error:
                found = [layer] if f"'{layer}" in str(error) else [str(error)]
            if found[:1] != [layer]:
                missed.append((layer, what, found))
        assert missed == []


@pytest.mark.parametrize("case", QDQ_CASES)
def test_qdq_models_with_one_fault_in_any_layer_have_it_found_and_named(case: str) -> None:
    missed, right = [], qdq_model(case)
    for layer in golden_case(case).record:
        for name, step in (("weight", 1), ("weight.scale", 1e-6), ("bias", 1), ("bias.scale", 0.1)):
            model, constant, change = copy.deepcopy(right), f"{layer}.{name}", faults.one_more(2, step)
            if any(tensor.name == constant for tensor in model.graph.initializer):
                dtype = faults.array(model, constant).dtype
                faults.set_array(model, constant, lambda a, c=change, d=dtype: c(a.astype(np.float64)).astype(d))
                departures = verified(case, "qdq", model, until_found=True).departures
                if not departures or departures[0].layer != layer:
                    missed.append((layer, name, departures[:1]))
    assert missed == []


class TestScalesRoundedToFloat16:
    def test_are_those_of_the_record_and_not_of_training(self) -> None:
        """The configuration asks for it, so that the codes differ from those of the model and the file is right."""
        case = "cnn_bn_relu__fp16_mode_cfg"
        model = golden_model(case, "deploy")
        for name, layer in side_of_torch(case)[1].items():
            quant = faults.node(model, f"{name}.quant")
            for attribute in quant.attribute:
                if attribute.name == "scale":
                    attribute.f = 1 / layer.record.scale_d
                elif attribute.name == "offset":
                    attribute.f = layer.record.offset_d
            product = layer.input
            parameter = product.scale.view(np.uint32).astype(np.uint64)
            faults.set_array(model, f"{name}.dequant.param", lambda _, p=parameter: p)
            faults.set_array(model, f"{name}.sub_module.bias", lambda _, b=product.bias: b.astype(np.int32))
        assert [str(departure) for departure in verified(case, "deploy", model).departures] == []
        for layer in faults.layers(model):
            broken = copy.deepcopy(model)
            faults.set_array(broken, f"{layer}.sub_module.weight", faults.one_more(3))
            assert verified(case, "deploy", broken).departures[0].layer == layer


class TestBetweenLayers:
    def test_another_activation_is_found_at_the_layer_that_reads_it(self) -> None:
        model = golden_model("res_down__default", "deploy")
        faults.node(model, "block.relu1").op_type = "Identity"
        first = verified("res_down__default", "deploy", model).departures[0]
        assert first.layer == "block.conv2"
        assert "what it reads differs by" in first.what
        assert "computed from the output of 'block.conv1'" in first.what

    def test_a_residual_that_is_left_out_is_found_too(self) -> None:
        model = golden_model("res_down__default", "deploy")
        add = faults.node(model, "/block2/Add")
        add.input[1] = add.input[0]
        first = verified("res_down__default", "deploy", model).departures[0]
        assert (first.layer, "the operators after it" in first.what or "reads" in first.what) == ("fc", True)

    def test_what_comes_after_the_last_layer_is_found_at_that(self) -> None:
        model = golden_model("cnn_bn_relu__default", "deploy")
        faults.node(model, "fc.dequant").output[0] = "scores"
        model.graph.node.append(helper.make_node("Neg", ["scores"], [model.graph.output[0].name], "negative"))
        first = verified("cnn_bn_relu__default", "deploy", model).departures[0]
        assert first.layer == "fc"
        assert "the operators after it, up to output '18': it differs by 200.0%" in first.what

    def test_a_layer_that_stays_in_float_is_named(self) -> None:
        """As AMCT exports a layer that is not in the record, without a word."""
        model = golden_model("mlp__a16w8_json", "deploy")
        weight = faults.array(model, "fc1.sub_module.weight").astype(np.float32)
        faults.set_array(model, "fc1.sub_module.weight", lambda _: weight)
        faults.set_array(model, "fc1.sub_module.bias", lambda values: values.astype(np.float32))
        nodes = {name: faults.node(model, name) for name in ("fc1.quant", "fc1", "fc1.dequant")}
        nodes["fc1"].input[0] = nodes["fc1.quant"].input[0]
        nodes["fc1"].output[0] = nodes["fc1.dequant"].output[0]
        for name in ("fc1.quant", "fc1.dequant"):
            model.graph.node.remove(nodes[name])
        first = verified("mlp__a16w8_json", "deploy", model).departures[0]
        assert (first.layer, first.what) == ("fc1", "it is not quantized in the file")
