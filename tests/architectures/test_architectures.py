"""Whole architectures of the transformers library, tiny and with random weights: convert, train, evaluate, record."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, conversion_report, prepare_qat, quantized_layers
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.graph.eligibility import NOT_REACHED
from amct_lightning.layer_types import LAYER_TYPES
from tests.architectures.models import ALBERT, ARCHITECTURES, BERT, RESNET_CLASSIFIER, SWITCH, Architecture

STEPS = 2


@dataclass
class Run:
    """A float model, and its twin after two training steps and an evaluation."""

    float_model: nn.Module
    model: nn.Module
    losses: list[float]
    evaluated: list[Tensor]


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or something to minimize for a model without labels."""
    loss = output.get("loss")
    return output.logits.square().mean() + output.pred_boxes.mean() if loss is None else loss


@functools.cache
def run_of(architecture: Architecture, allow_reuse: bool = False) -> Run:
    torch.manual_seed(0)
    float_model, inputs = architecture.build(), architecture.inputs()
    model = prepare_qat(float_model, None, inputs, allow_reuse=allow_reuse).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(**inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        output = model.eval()(**inputs)
    return Run(float_model, model, losses, [value for value in output.values() if isinstance(value, Tensor)])


@pytest.fixture(params=ARCHITECTURES, ids=str)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture
def run(architecture: Architecture) -> Run:
    return run_of(architecture)


def supported_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in LAYER_TYPES]


def test_every_supported_layer_is_quantized_but_those_that_cannot_be(architecture: Architecture, run: Run) -> None:
    expected = [name for name in supported_layers(run.float_model) if not re.search(architecture.in_float, name)]
    assert list(quantized_layers(run.model)) == expected
    assert expected


def test_the_losses_are_finite(run: Run) -> None:
    assert torch.isfinite(torch.tensor(run.losses)).all()


def test_every_clip_and_every_weight_that_is_trained_gets_a_gradient(run: Run) -> None:
    for name, layer in quantized_layers(run.model).items():
        assert layer.input_quantizer.clip_max.grad is not None, name
        weights = [getattr(layer, parameter) for parameter in layer.weight_quantizers.values()]
        assert all(weight.grad is not None for weight in weights if weight.requires_grad), name


def test_training_changes_the_weights(run: Run) -> None:
    before = dict(run.float_model.named_parameters())
    trained = {name: p for name, p in run.model.named_parameters() if name in before and p.grad is not None}
    changed = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    assert len(changed) > len(trained) / 2  # the gradient of the others is zero or too small


def test_the_evaluation_is_finite(run: Run) -> None:
    assert run.evaluated
    assert all(torch.isfinite(value).all() for value in run.evaluated)


def test_the_record_lists_exactly_the_quantized_layers_and_can_be_read(run: Run, tmp_path: Path) -> None:
    record = QuantRecord.from_model(run.model)
    record.save(tmp_path / "record.txt")
    assert set(record) == set(quantized_layers(run.model))
    assert QuantRecord.load(tmp_path / "record.txt") == record


def test_the_report_accounts_for_every_supported_layer(run: Run) -> None:
    rows = {row.name: row for row in conversion_report(run.model).rows}
    assert rows.keys() >= set(supported_layers(run.float_model))
    assert [name for name, row in rows.items() if row.quantized] == list(quantized_layers(run.model))


def test_the_queries_keys_and_values_of_attention_share_one_quantizer() -> None:
    attention = run_of(BERT).model.bert.encoder.layer[0].attention.self
    assert attention.query.input_quantizer is attention.key.input_quantizer
    assert attention.query.input_quantizer is attention.value.input_quantizer


def test_a_resnet_s_batch_norms_are_folded_into_the_record() -> None:
    plan = make_plan(RESNET_CLASSIFIER.build(), None, RESNET_CLASSIFIER.inputs())
    convolutions = [layer for layer in plan.layers if layer.name.endswith("convolution")]
    assert convolutions
    assert all(layer.batch_norm == layer.name.replace("convolution", "normalization") for layer in convolutions)


def test_the_one_layer_of_albert_that_runs_for_all_is_quantized_with_allow_reuse() -> None:
    run = run_of(ALBERT, allow_reuse=True)
    assert list(quantized_layers(run.model)) == supported_layers(run.float_model)
    assert torch.isfinite(torch.tensor(run.losses)).all()
    assert set(QuantRecord.from_model(run.model)) == set(supported_layers(run.float_model))
    assert {row.calls for row in conversion_report(run.model).rows if "albert_layers" in row.name} == {2}


def test_tied_word_embeddings_stay_tied() -> None:
    model = run_of(next(a for a in ARCHITECTURES if a.model == "T5ForConditionalGeneration")).model
    assert model.lm_head.weight is model.shared.weight
    assert "lm_head" in quantized_layers(model)


def test_experts_that_the_example_does_not_reach_stay_in_float_and_are_reported() -> None:
    """AMCT drops layers that are never called; a range for inputs that were never seen could only be guessed."""
    model = SWITCH.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router.classifier" in name:
                parameter.zero_()  # a tie, which the first expert wins
    converted = prepare_qat(model, None, SWITCH.inputs())
    experts = {row.name: row for row in conversion_report(converted).rows if ".expert_" in row.name}
    assert {row.reason for name, row in experts.items() if ".expert_0." in name} == {None}
    assert {row.reason for name, row in experts.items() if ".expert_1." in name} == {NOT_REACHED}
    assert any("never reached by input_data" in warning for warning in conversion_report(converted).warnings)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_library_changes_nothing(reentrant: bool) -> None:
    """The second forward within the backward pass is not another calibration batch."""
    float_model, batches = BERT.build(), [BERT.inputs() for _ in range(3)]
    for module in float_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for checkpointing in (False, True):
        model = prepare_qat(float_model, {"batch_num": 2}, batches[0]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
