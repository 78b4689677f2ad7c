"""A Linear with a weight scale per output channel: choices, record, forms of an export, and what it is good for."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from amct_lightning import (
    QuantRecord,
    RetrainConfig,
    calibrate,
    conversion_report,
    export_onnx,
    prepare_qat,
    quantized_layers,
    verify_export,
)
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.quantizers.shift_search import best_shifts, shift_errors

SHAPES = [(8, 16), (2, 3, 16), (16,)]
ALGORITHMS = ["arq_retrain", "ulq_retrain"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))


def trained(x: Tensor, **weights: Any) -> nn.Module:
    model = prepare_qat(network(), {"weights": {"channel_wise": True, **weights}}, x, search_n=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dst_type", ["INT8", "INT4"])
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_record_and_the_files_have_a_scale_per_channel(
    tmp_path: Path, shape: tuple[int, ...], algo: str, dst_type: str
) -> None:
    x = torch.randn(shape)
    model = trained(x, algo=algo, dst_type=dst_type)
    record = QuantRecord.from_model(model)
    assert [len(layer.scale_w) for layer in record.values()] == [32, 5]
    assert all(len(set(layer.scale_w)) > 1 for layer in record.values())
    assert QuantRecord.from_text(record.to_text()) == record
    files = {form: tmp_path / f"{form}.onnx" for form in ("qdq", "fake_quant")}
    for form, file in files.items():
        export_onnx(model, file, x, form)  # type: ignore[arg-type]
    assert verify_export(model, files, [x]).ok


def test_the_deploy_form_is_refused_with_the_layers_and_the_remedy(tmp_path: Path) -> None:
    x = torch.randn(8, 16)
    model = trained(x)
    with pytest.raises(ValueError, match=r"form 'deploy' .*ATC.*: '0', '2'\. .*channel_wise: false.*'qdq' or 'fake_qu"):
        export_onnx(model, tmp_path / "net.onnx", x, "deploy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_max_abs_scales_are_those_of_the_rows(algo: str) -> None:
    x = torch.randn(8, 16)
    model = prepare_qat(network(), {"weights": {"algo": algo, "channel_wise": True}}, x)
    for layer in quantized_layers(model).values():
        rows = layer.weight.detach()  # type: ignore[union-attr]
        high, low = rows.amax(1), -rows.amin(1)
        expected = torch.maximum(high, low) / torch.where(high < low, 128.0, 127.0)
        assert torch.equal(layer.weight_quantizer.scale.detach(), expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shifts_are_searched_on_the_last_axis(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = trained(x)
    y = model(x).detach()
    layer = QuantRecord.from_model(model)["2"]
    scale = torch.tensor(layer.scale_w) * layer.scale_d
    assert layer.shift_bit == best_shifts(shift_errors(y.reshape(-1, 5), scale)).tolist()


def test_settings_made_in_code_survive_the_plan_in_a_checkpoint() -> None:
    x = torch.randn(8, 16)
    config = RetrainConfig.from_choices({"weights": {"channel_wise": True}}, network(), x)
    model = prepare_qat(network(), config, x)
    assert [row.channel_wise for row in conversion_report(model).rows] == [True, True]
    assert str(conversion_report(model)).count("A8W8 ARQ/ch") == 2
    found = find_plan(model)
    assert found is not None
    again = QuantPlan.from_dict(found[1].to_dict())
    assert again == found[1]
    assert find_plan(prepare_qat(network(), again.config, x)) is not None


@pytest.mark.parametrize("search_n", [False, True])
def test_by_default_nothing_changes(search_n: bool) -> None:
    x = torch.randn(8, 16)
    model = prepare_qat(network(), None, x, search_n=search_n)
    calibrate(model, [x])
    model.eval()(x)
    record = QuantRecord.from_model(model)
    assert [len(layer.scale_w) for layer in record.values()] == [1, 1]
    assert [len(layer.shift_bit) for layer in record.values()] == [search_n, search_n]


def bert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).eval()


@torch.no_grad()
def hidden(model: nn.Module, words: Tensor) -> Tensor:
    found: Tensor = model(input_ids=words).last_hidden_state
    return found


@pytest.mark.parametrize(("types", "factor"), [(("INT16", "INT8"), 1.4), (("INT8", "INT4"), 1.8)], ids=str)
def test_a_bert_that_is_not_retrained_loses_less(types: tuple[str, str], factor: float) -> None:
    ratios = []
    for seed in range(5):
        model, words, x = bert(seed), torch.randint(50, (8, 16)), torch.randint(50, (8, 16))
        errors = []
        for by_channel in (False, True):
            weights = {"dst_type": types[1], "channel_wise": by_channel}
            choices = {"activations": {"dst_type": types[0]}, "weights": weights}
            quantized = prepare_qat(model, choices, {"input_ids": words})
            calibrate(quantized, [{"input_ids": words}])
            errors.append((hidden(quantized.eval(), x) - hidden(model, x)).square().mean().item())
        ratios.append(errors[0] / errors[1])
    assert statistics.median(ratios) > factor
