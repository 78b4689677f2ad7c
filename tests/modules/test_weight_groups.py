"""A Linear whose INT4 weights have a scale for each group of inputs: as a matrix whose rows are the groups."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import onnx
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
    verify_export,
)
from amct_lightning.config import LayerConfig, WeightConfig, load_config
from amct_lightning.config.fit import resolve_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.modules.fused.choice import set_execution, without_integers
from amct_lightning.quantizers import ChannelLayout, LearnedWeightQuantizer, WeightQuantizer
from tests.export.verify import faults

ALGORITHMS = ["arq_retrain", "ulq_retrain"]
SHAPES = [(8, 64), (2, 3, 64), (64,)]


def choices(algo: str = "arq_retrain", size: int = 32) -> dict[str, Any]:
    return {"weights": {"algo": algo, "dst_type": "INT4", "group_size": size}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 5, bias=False))


def trained(x: Tensor, algo: str = "arq_retrain", **options: Any) -> nn.Sequential:
    model: Any = prepare_qat(network(), choices(algo), x, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("execution", ["composite", "compiled", "integer"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_groups_are_quantized_like_the_rows_of_a_matrix(algo: str, execution: Any) -> None:
    """Values and gradients, to the bit."""
    x = torch.randn(8, 64)
    model: Any = prepare_qat(nn.Sequential(nn.Linear(64, 5)), choices(algo), x, execution=execution).train()
    rows = model[0].weight.detach().reshape(-1, 32).requires_grad_()
    settings = 4, True, ChannelLayout(), rows.detach()
    reference = WeightQuantizer(*settings) if algo == "arq_retrain" else LearnedWeightQuantizer(*settings, elements=32)
    y = model(x)
    wanted_weight = reference.train()(rows)
    values = model[0].input_quantizer(x).detach()
    wanted = nn.functional.linear(values, wanted_weight.view(5, 64), model[0].bias.detach())
    assert torch.equal(y, wanted)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wanted.backward(gradient)
    assert torch.equal(model[0].weight.grad, rows.grad.view(5, 64))
    assert torch.equal(model[0].weight_quantizer.scale, reference.scale)
    assert model[0].weight_quantizer.scale.shape == (10,)
    if algo == "ulq_retrain":
        torch.testing.assert_close(model[0].weight_quantizer.scale.grad, reference.scale.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_record_and_the_file_have_a_scale_per_group(tmp_path: Path, shape: tuple[int, ...], algo: str) -> None:
    x = torch.randn(shape)
    model = trained(x, algo, search_n=True)
    model(x)
    record = QuantRecord.from_model(model)
    assert [len(layer.scale_w) for layer in record.values()] == [96 * 2, 5 * 3]
    assert not any(layer.shift_bit for layer in record.values())
    assert QuantRecord.from_text(record.to_text()) == record
    export_onnx(model, tmp_path / "net.onnx", x)
    assert verify_export(model, {"qdq": tmp_path / "net.onnx"}, [x]).ok
    nodes = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "DequantizeLinear"]
    blocks = [{a.name: a.i for a in node.attribute} for node in nodes if len(node.attribute)]
    assert blocks == [{"axis": 0, "block_size": 32}] * 2


@pytest.mark.parametrize("what", ["weight", "scale", "bias"])
def test_a_fault_in_the_file_is_found(tmp_path: Path, what: str) -> None:
    x = torch.randn(8, 64)
    model = trained(x)
    export_onnx(model, tmp_path / "net.onnx", x)
    network = onnx.load(tmp_path / "net.onnx")
    name = {"weight": "0.sub_module.weight", "scale": "0.sub_module.weight.scale", "bias": "0.sub_module.bias"}[what]
    array = faults.array(network, name).copy()
    array[0] = array[1]
    faults.set_array(network, name, lambda _: array)
    onnx.save(network, tmp_path / "net.onnx")
    report = verify_export(model, {"qdq": tmp_path / "net.onnx"}, [x])
    assert report.first_departure is not None
    assert report.first_departure.layer == "0"


@pytest.mark.parametrize("form", ["deploy", "fake_quant"])
def test_forms_of_integer_sums_are_refused(tmp_path: Path, form: Any) -> None:
    x = torch.randn(8, 64)
    with pytest.raises(
        ValueError, match=r"no weights in groups \(group_size\).*: '0', '2'\. Export the form 'qdq', or"
    ):
        export_onnx(trained(x), tmp_path / "net.onnx", x, form)
    assert not list(tmp_path.iterdir())


def test_integers_are_left_with_a_reason_and_the_device_s_grid_is_refused() -> None:
    x = torch.randn(8, 64)
    model = trained(x)
    set_execution(model, "integer")
    assert [*without_integers(model).values()] == [["0", "2"]]
    assert "its weight has a scale per group of inputs" in str(conversion_report(model))
    with pytest.raises(
        ValueError, match=r"config gives weights in groups \(group_size\) to '0', '2', and with deploy_gr"
    ):
        prepare_qat(network(), choices(), x, deploy_grid=True)


def test_the_export_of_torch_gives_the_same_bits() -> None:
    x = torch.randn(8, 64)
    model = trained(x)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), wanted)
        torch.testing.assert_close(torch.func.vmap(model)(x), wanted, rtol=1e-4, atol=1e-5)


def test_copies_and_the_plan_of_a_checkpoint_keep_the_groups() -> None:
    x = torch.randn(8, 64)
    model = trained(x, "ulq_retrain")
    found = find_plan(model)
    assert found is not None
    plan = found[1]
    assert QuantPlan.from_dict(plan.to_dict()) == plan
    again: Any = prepare_qat(network(), plan.config, x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert [row.group_size for row in conversion_report(model).rows] == [32, 32]
    assert "A8W4 ULQ/g32" in str(conversion_report(model))


MIXED: dict[str, nn.Module] = {"conv": nn.Conv2d(32, 8, 1), "fc": nn.Linear(128, 64), "head": nn.Linear(64, 10)}


def sizes(raw: dict[str, Any]) -> list[tuple[bool | None, int | None]]:
    config = load_config(raw).resolve(MIXED, "my.yaml")
    weights = [layer.retrain_weight_config for layer in config.values()]
    return [(weight.channel_wise, weight.group_size) for weight in weights]


class TestSettings:
    """Where groups are, and what is refused before anything is converted."""

    def test_at_the_top_they_are_for_linear_layers_with_int4(self) -> None:
        int4 = {"dst_type": "INT4", "group_size": 64}
        assert sizes({"weights": int4}) == [(True, None), (True, 64), (True, 64)]
        other = {"head": {"weights": {"dst_type": "INT8"}}}
        assert sizes({"weights": int4, "layers": other}) == [(True, None), (True, 64), (False, None)]
        none = {"head": {"weights": {"group_size": None}}}
        assert sizes({"weights": int4, "layers": none}) == [(True, None), (True, 64), (False, None)]
        assert sizes({"types": {"Linear": {"weights": int4}}}) == [(True, None), (True, 64), (True, 64)]

    def test_inputs_that_are_no_whole_groups_are_refused_with_the_layer_and_the_remedy(self) -> None:
        message = (
            r"^my\.yaml: 'head' \(in_features=64, group_size=128\): .* another group_size \(32, 64 or 128\) or none"
        )
        with pytest.raises(ValueError, match=message):
            sizes(choices(size=128))
        assert sizes(choices(size=128) | {"skip_layers": ["head"]})[1:] == [(True, 128), (False, None)]

    @pytest.mark.parametrize(
        ("weights", "kind", "message"),
        [
            ({"group_size": 48}, ValueError, "'weights.group_size' must be one of 32, 64, 128, found 48"),
            ({"group_size": "64"}, TypeError, "'weights.group_size' must be one of 32, 64, 128, found '64'"),
            ({"group_size": True}, TypeError, "'weights.group_size' must be one of 32, 64, 128, found True"),
            ({"group_size": 64, "dst_type": "INT8"}, ValueError, "is for weights of INT4, and dst_type is INT8"),
            ({"group_size": 64, "channel_wise": False}, ValueError, "leave one of the two out"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, weights: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            load_config({"weights": {"dst_type": "INT4", **weights}})

    def test_amct_s_file_has_none(self) -> None:
        layer = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4", group_size=64))
        config = RetrainConfig(layers={"fc": layer})
        assert config.resolve(MIXED)["fc"].retrain_weight_config.group_size == 64
        with pytest.raises(ValueError, match=r"^my\.json: layer 'fc'.*group_size': AMCT's files have no groups"):
            RetrainConfig.from_dict(config.to_dict(), "my.json").resolve(MIXED, "my.json")
        with pytest.raises(ValueError, match="AMCT's files have no groups"):
            resolve_layers({"fc": layer}, MIXED, "my.cfg", amct_rules=True)

    def test_a_target_of_the_compiler_takes_them_away(self) -> None:
        x = torch.randn(8, 64)
        with pytest.raises(ValueError, match=r"'0' \(Linear, A8W4\), .*ATC takes one weight scale"):
            prepare_qat(network(), choices(), x, target="A2")
        with pytest.warns(UserWarning, match="One weight scale is used for '0', '2'"):
            model = prepare_qat(network(), choices(), x, target="A2", on_unsupported="fallback")
        assert [(row.bits, row.channel_wise, row.group_size) for row in conversion_report(model).rows] == [
            ("A8W4", False, 0)
        ] * 2


@torch.no_grad()
def hidden(model: nn.Module, words: Tensor) -> Tensor:
    found: Tensor = model(input_ids=words).last_hidden_state
    return found


def test_a_bert_that_is_not_retrained_loses_less_than_with_a_scale_per_channel() -> None:
    ratios = []
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    for seed in range(5):
        torch.manual_seed(seed)
        bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).eval()
        words, x = torch.randint(50, (8, 16)), torch.randint(50, (8, 16))
        errors = []
        for weights in ({"channel_wise": True}, {"group_size": 32}):
            quantized = prepare_qat(bert, {"weights": {"dst_type": "INT4", **weights}}, {"input_ids": words})
            calibrate(quantized, [{"input_ids": words}])
            errors.append((hidden(quantized.eval(), x) - hidden(bert, x)).square().mean().item())
        ratios.append(errors[0] / errors[1])
    assert statistics.median(ratios) > 1.15
