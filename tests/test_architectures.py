"""Whole architectures of the transformers library, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amct_lightning import QuantRecord, prepare_qat, quantized_layers

transformers = pytest.importorskip("transformers")

LABELS = 3


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=LABELS
        )
    )


def convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=4, num_labels=LABELS)
    )


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
            num_labels=LABELS,
        )
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=LABELS,
        )
    )


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 20, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


ARCHITECTURES = [(resnet, images), (convnext, images), (vit, images), (bert, tokens)]


@pytest.fixture(params=ARCHITECTURES, ids=lambda pair: pair[0].__name__)
def architecture(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    make, inputs = request.param
    return make(), inputs()


def float_layers(model: nn.Module) -> list[str]:
    kinds = (nn.Conv2d, nn.Linear)
    return [name for name, module in model.named_modules() if type(module) in kinds]


def train(model: nn.Module, inputs: dict[str, Any], steps: int = 2) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_convolution_and_linear_layer_is_quantized(
    architecture: tuple[nn.Module, dict[str, Any]],
) -> None:
    model, inputs = architecture
    expected = float_layers(model)
    assert list(quantized_layers(prepare_qat(model, None, inputs))) == expected


def test_two_training_steps_change_every_clip_and_weight(
    architecture: tuple[nn.Module, dict[str, Any]],
) -> None:
    model, inputs = architecture
    converted = prepare_qat(model, None, inputs)
    losses = train(converted, inputs)
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, layer in quantized_layers(converted).items():
        assert layer.weight.grad is not None, name
        assert layer.input_quantizer.clip_max.grad is not None, name


def test_the_record_is_complete_and_valid(architecture: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    model, inputs = architecture
    converted = prepare_qat(model, None, inputs)
    train(converted, inputs)
    record = QuantRecord.from_model(converted)
    record.save(tmp_path / "record.txt")
    assert set(record) == set(float_layers(model))
    assert QuantRecord.load(tmp_path / "record.txt") == record


def test_the_queries_keys_and_values_of_attention_share_one_quantizer() -> None:
    converted = prepare_qat(bert(), None, tokens())
    attention = converted.bert.encoder.layer[0].attention.self
    assert attention.query.input_quantizer is attention.key.input_quantizer
    assert attention.query.input_quantizer is attention.value.input_quantizer


def test_a_resnet_s_batch_norms_are_folded_into_the_record() -> None:
    from amct_lightning.graph.plan import make_plan

    plan = make_plan(resnet(), None, images())
    convolutions = [layer for layer in plan.layers if layer.name.endswith("convolution")]
    assert convolutions
    assert all(layer.batch_norm == layer.name.replace("convolution", "normalization") for layer in convolutions)


@pytest.mark.parametrize("make", [resnet, bert])
def test_evaluation_after_training_is_finite(make: Callable[[], nn.Module]) -> None:
    inputs = images() if make is resnet else tokens()
    converted = prepare_qat(make(), None, inputs)
    train(converted, inputs)
    with torch.no_grad():
        assert torch.isfinite(converted.eval()(**inputs).logits).all()
