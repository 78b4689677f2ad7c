"""A target is checked before any training: each generation with each layer type and each pair of types."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import (
    RetrainConfig,
    conversion_report,
    create_quant_retrain_config,
    create_quant_retrain_model,
    prepare_qat,
    quantized_layers,
    restore_quant_retrain_model,
)
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.on_target import TargetRules
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.targets import ATC_TARGETS, TARGETS

BITS = {"A8W8": ("INT8", "INT8"), "A16W8": ("INT16", "INT8"), "A8W4": ("INT8", "INT4"), "A4W4": ("INT4", "INT4")}
LAYERS = {
    "Conv1d": nn.Conv1d(2, 2, 1),
    "Conv2d": nn.Conv2d(2, 2, 1),
    "Conv3d": nn.Conv3d(2, 2, 1),
    "Linear": nn.Linear(2, 2),
    "ConvTranspose1d": nn.ConvTranspose1d(2, 2, 1),
    "ConvTranspose2d": nn.ConvTranspose2d(2, 2, 1),
    "ConvTranspose3d": nn.ConvTranspose3d(2, 2, 1),
    "LSTM": nn.LSTM(2, 2),
    "GRU": nn.GRU(2, 2),
}
OF_KIND = {"Conv1d": "unsupported", "ConvTranspose1d": "unsupported", "GRU": "unsupported"} | {
    "LSTM": "doubtful",
    "ConvTranspose3d": "doubtful",
}


def of_types(target: str, bits: str) -> str:
    if bits == "A8W8":
        return "runs"
    if TARGETS[target].serves:
        return "unsupported"
    return "unsupported" if target == "950" and bits.endswith("W4") else "doubtful"


def layer_config(bits: str, **more: Any) -> LayerConfig:
    data, weight = BITS[bits]
    return LayerConfig(True, DataConfig(dst_type=data), WeightConfig(dst_type=weight, **more))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_type_with_every_pair_of_types(target: str, kind: str, bits: str) -> None:
    rules = TargetRules.of(target, "error", "test")
    assert rules is not None
    found = rules.obstacles({"x": layer_config(bits)}, {"x": LAYERS[kind]})
    expected = [OF_KIND.get(kind, "runs")]
    if TARGETS[target].serves:
        expected = ["runs" if kind == "Linear" else "unsupported"]
    if expected != ["unsupported"]:  # of what does not run at all the types are not of interest
        expected.append(of_types(target, bits))
    assert [o.fact.verdict for o in found] == [verdict for verdict in expected if verdict != "runs"]
    assert {(o.layer, o.kind, o.types) for o in found} <= {("x", kind, bits)}


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("target", ATC_TARGETS)
def test_grouped_and_depthwise_convolutions_are_doubtful(target: str, groups: int) -> None:
    with pytest.warns(UserWarning, match=r"worth a second look: '0' \(Conv2d, A8W8\): npu_quant_conv2d.*groups=1 only"):
        prepare_qat(nn.Sequential(nn.Conv2d(4, 4, 1, groups=groups)), None, torch.randn(1, 4, 2, 2), target=target)


def test_a_disabled_layer_is_nobody_s_concern() -> None:
    rules = TargetRules.of("950", "error", "test")
    assert rules is not None
    assert rules.check({"x": LayerConfig(retrain_enable=False)}, {"x": LAYERS["GRU"]}, "config") == []


class Branches(nn.Module):
    """Two linear layers read one tensor, a third one what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) + self.k(x))


def owners(model: nn.Module) -> dict[str, str]:
    found = find_plan(model)
    assert found is not None
    return {layer.name: layer.shares_input_of for layer in found[1].layers}


def bits_of(model: nn.Module) -> dict[str, str]:
    return {row.name: row.bits for row in conversion_report(model).rows}


def test_what_does_not_run_is_refused_by_default_and_the_message_says_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        prepare_qat(Branches(), "A4W4", torch.randn(2, 4), source="run.yaml", target="950")
    text = str(error.value)
    assert text.startswith("run.yaml: target 950 (Ascend 950PR/950DT) does not run as configured: 'q' (Linear, A4W4), ")
    assert "the matrix unit has no INT4" in text
    assert "[read] asc-devkit" in text
    assert "the types (activations/weights) INT8/INT8, INT16/INT8 and the layers Linear, Conv2d" in text
    assert "Set the dst_type of activations and weights to INT8, or give on_unsupported='fallback'" in text
    assert "or 'warn' to train as configured" in text


@pytest.mark.parametrize("bits", ["A4W4", "A8W4"])
def test_fallback_takes_int8_and_layers_share_their_quantizer_as_before(bits: str) -> None:
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"does not run as configured.*INT8 is used for 'q', 'k', 'out'\.$"):
        model = prepare_qat(Branches(), bits, x, target="950", on_unsupported="fallback")
    assert set(bits_of(model).values()) == {"A8W8"}
    assert owners(model) == {"q": "q", "k": "q", "out": "out"}
    assert model.q.input_quantizer is model.k.input_quantizer
    assert owners(model) == owners(prepare_qat(Branches(), "INT8", x))
    assert torch.isfinite(model.train()(x)).all()


def test_a_layer_that_falls_back_shares_with_one_that_has_int8_already() -> None:
    config = RetrainConfig(layers={"q": layer_config("A4W4"), "k": layer_config("A8W8"), "out": layer_config("A8W8")})
    x = torch.randn(2, 4)
    assert owners(prepare_qat(Branches(), config, x))["k"] == "k"
    with pytest.warns(UserWarning, match=r"INT8 is used for 'q'\.$"):
        model = prepare_qat(Branches(), config, x, target="950", on_unsupported="fallback")
    assert owners(model)["k"] == "q"
    assert model.q.input_quantizer is model.k.input_quantizer
    assert config["q"] == layer_config("A4W4")  # the user's own is as it was


def test_what_is_no_type_but_a_layer_stays_in_float_with_the_reason_in_the_report() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(2, 2, 3)
    with pytest.raises(ValueError, match=r"'0' \(Conv1d, A8W8\): AMCT.*Leave the layers in float, or give on_unsupp"):
        prepare_qat(model, None, x, target="A2")
    with pytest.warns(UserWarning, match=r"'0' \(Conv1d, A8W8\): .*\. '0' stays in float\.$"):
        qat = prepare_qat(model, None, x, target="A2", on_unsupported="fallback")
    assert list(quantized_layers(qat)) == ["2"]
    report = conversion_report(qat)
    assert report.rows[0].reason is not None
    assert report.rows[0].reason.startswith("target A2: AMCT's documentation says that no product")
    assert "1 of 2 layers are quantized for target A2 (" in str(report)


def test_types_and_layers_fall_back_each_in_its_way() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(2, 2, 3)
    with pytest.raises(ValueError, match=r"Set the dst_type of .* to INT8 and leave the layers in float, or"):
        prepare_qat(model, "A8W4", x, target="950")
    with pytest.warns(UserWarning, match=r"INT8 is used for '2' and '0' stays in float\.$"):
        qat = prepare_qat(model, "A8W4", x, target="950", on_unsupported="fallback")
    assert bits_of(qat) == {"0": "", "2": "A8W8"}


BY_CHANNEL = {"weights": {"channel_wise": True}, "types": {"Linear": {"activations": {"dst_type": "INT8"}}}}


@pytest.mark.parametrize("target", ATC_TARGETS)
def test_a_linear_layer_with_a_scale_per_channel_is_refused_and_falls_back_to_one(target: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 2, 3, 1)
    with pytest.raises(
        ValueError, match=r"'2' \(Linear, A8W8\): ATC takes one weight scale.*Set channel_wise to false"
    ):
        prepare_qat(model, BY_CHANNEL, x, target=target)
    with pytest.warns(UserWarning, match=r"does not run.*\. One weight scale is used for '2'\.$"):
        qat = prepare_qat(model, BY_CHANNEL, x, target=target, on_unsupported="fallback")
    assert [row.channel_wise for row in conversion_report(qat).rows] == [True, False]
    with pytest.warns(UserWarning, match=r"'2' .*They train as configured all the same"):
        qat = prepare_qat(model, BY_CHANNEL, x, target=target, on_unsupported="warn")
    assert [row.channel_wise for row in conversion_report(qat).rows] == [True, True]


def test_a_layer_falls_back_in_its_types_and_in_its_scales() -> None:
    choices, x = {"weights": {"dst_type": "INT4", "channel_wise": True}}, torch.randn(2, 4)
    with pytest.warns(
        UserWarning, match=r"INT8 is used for 'q', 'k', 'out' and one weight scale is used for 'q', 'k',"
    ):
        qat = prepare_qat(Branches(), choices, x, target="950", on_unsupported="fallback")
    assert [(row.bits, row.channel_wise) for row in conversion_report(qat).rows] == [("A8W8", False)] * 3


def test_nothing_left_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 4, 1)), torch.randn(2, 2, 3)
    with pytest.raises(ValueError, match="nothing is left to quantize"):
        prepare_qat(model, None, x, target="A3", on_unsupported="fallback")


def test_warn_trains_as_configured() -> None:
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match=r"does not run as configured.*They train as configured all the same"):
        model = prepare_qat(Branches(), "A4W4", x, target="950", on_unsupported="warn")
    assert set(bits_of(model).values()) == {"A4W4"}


@pytest.mark.parametrize("on_unsupported", ["error", "fallback", "warn"])
@pytest.mark.parametrize("target", ["A2", "A3", "310P"])
def test_int4_where_the_matrix_unit_has_it_is_told_and_kept(target: str, on_unsupported: str) -> None:
    with pytest.warns(UserWarning, match=r"worth a second look: 'q' \(Linear, A4W4\), .*\[doc\] .*AMCT, create_quant"):
        model = prepare_qat(Branches(), "A4W4", torch.randn(2, 4), target=target, on_unsupported=on_unsupported)
    assert set(bits_of(model).values()) == {"A4W4"}


@pytest.mark.parametrize("target", [*TARGETS, 950])
def test_int8_goes_without_a_word_everywhere(target: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_qat(Branches(), "INT8", torch.randn(2, 4), target=target)
    assert conversion_report(model).target == str(target)


def test_without_a_target_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_qat(Branches(), "A4W4", torch.randn(2, 4))
    assert conversion_report(model).target is None
    assert "target" not in str(conversion_report(model))


@pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4.*")
def test_a_layer_that_has_int8_since_int4_cannot_be_packed_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    assert bits_of(prepare_qat(model, "A4W4", torch.randn(2, 3), target="950")) == {"0": "A8W8"}


@pytest.mark.parametrize("function", ["prepare_qat", "create_quant_retrain_config"])
def test_wrong_arguments_name_the_function(function: str, tmp_path: Path) -> None:
    def call(**options: Any) -> None:
        if function == "prepare_qat":
            prepare_qat(Branches(), None, torch.randn(2, 4), **options)
        else:
            create_quant_retrain_config(str(tmp_path / "c.json"), Branches(), torch.randn(2, 4), **options)

    with pytest.raises(ValueError, match=rf"{function}: target='A9': there is no such target. Give one of 'A2'"):
        call(target="A9")
    with pytest.raises(
        ValueError, match=rf"{function}\(on_unsupported='skip'\): must be 'error', 'fallback' or 'warn'"
    ):
        call(on_unsupported="skip")


def test_amct_s_functions_take_the_target(tmp_path: Path) -> None:
    choices, config, record = tmp_path / "simple.cfg", str(tmp_path / "config.json"), str(tmp_path / "record.txt")
    choices.write_text(
        "retrain_data_quant_config { ulq_quantize { dst_type: INT4 } }\n"
        "retrain_weight_quant_config { arq_retrain { channel_wise: false dst_type: INT4 } }\n"
    )
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(choices))}: target 950 "):
        create_quant_retrain_config(config, Branches(), x, str(choices), target="950")
    assert not Path(config).exists()
    create_quant_retrain_config(config, Branches(), x, str(choices))
    with pytest.raises(ValueError, match=rf"^{re.escape(config)}: target 950 "):
        create_quant_retrain_model(config, Branches(), record, x, target="950")
    with pytest.warns(UserWarning, match="INT8 is used"):
        model = create_quant_retrain_model(config, Branches(), record, x, target="950", on_unsupported="fallback")
    model.train()(x)
    torch.save(model.state_dict(), tmp_path / "last.pth")
    with pytest.warns(UserWarning, match="INT8 is used"):
        again = restore_quant_retrain_model(
            config, Branches(), record, x, str(tmp_path / "last.pth"), target="950", on_unsupported="fallback"
        )
    assert torch.equal(again.eval()(x), model.eval()(x))
    with pytest.warns(UserWarning, match="INT8 is used"):
        create_quant_retrain_config(config, Branches(), x, str(choices), target="950", on_unsupported="fallback")
    written = RetrainConfig.from_json(config)
    assert {layer.retrain_data_config.dst_type for layer in written.values()} == {"INT8"}
    assert {layer.retrain_weight_config.dst_type for layer in written.values()} == {"INT8"}


def test_the_target_is_kept_in_the_plain_form_of_the_plan_and_plans_of_before_have_none() -> None:
    plan = make_plan(Branches(), None, torch.randn(2, 4), target=TargetRules.of("A3", "error", "test"))
    plain = plan.to_dict()
    assert QuantPlan.from_dict(plain).target == plan.only(plan.layers[:1]).target == "A3"
    del plain["target"]
    assert QuantPlan.from_dict(plain).target is None
