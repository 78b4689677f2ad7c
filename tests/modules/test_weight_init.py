"""``weights: {init: mse}``: scales that start from the least squared error of the weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from amct_lightning import QuantRecord, RetrainConfig, calibrate, export_onnx, prepare_qat, verify_export
from amct_lightning.amct.migrate import convert_amct_state_dict
from amct_lightning.config import LayerConfig, WeightConfig, load_config
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.quantizers import ChannelLayout, WeightQuantizer
from amct_lightning.quantizers.functions.weight import arq_scale, fake_quantize_weight
from amct_lightning.quantizers.starting.weight_ratio import RATIOS, least_error_ratio

ALGORITHMS = ["arq_retrain", "ulq_retrain"]
LAYOUTS = [ChannelLayout(), ChannelLayout(transposed=True), ChannelLayout(transposed=True, groups=2)]


def choices(algo: str, **more: Any) -> dict[str, Any]:
    return {"weights": {"algo": algo, "dst_type": "INT4", "init": "mse", **more}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 6))
    with torch.no_grad():
        model[0].weight[::30, 5] = 0.25  # outliers, for which the other weights pay
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(x)[0]
        return output


def prepared_with_max_abs(x: Tensor) -> nn.Module:
    model = prepare_qat(network(), choices("arq_retrain", init="max_abs"), x)
    calibrate(model, [x])
    return model


def step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(4, 6), (6, 4, 3), (2, 4, 3, 3)]),
    layout=st.sampled_from(LAYOUTS),
    num_bits=st.sampled_from([4, 8]),
    channel_wise=st.booleans(),
    tail=st.sampled_from([1.0, 3.0]),
)
def test_no_ratio_that_is_tried_has_a_smaller_error(
    seed: int, shape: tuple[int, ...], layout: ChannelLayout, num_bits: int, channel_wise: bool, tail: float
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    weight = weight.sign() * weight.abs() ** tail
    scale = arq_scale(weight, layout, num_bits, channel_wise)

    def errors(ratio: Tensor | float) -> Tensor:
        found = fake_quantize_weight(weight, scale * ratio, layout, num_bits)
        view = layout.view((found - weight).double().square())
        return view.sum(layout.reduced_dims(view, channel_wise), keepdim=True)

    ratio = least_error_ratio(weight, layout, num_bits, channel_wise)
    assert ratio.shape == scale.flatten().shape
    found = errors(ratio.view(scale.shape))
    for other in (1.0, *RATIOS):
        assert bool((found <= errors(other) * (1 + 1e-5) + 1e-12).all())


def test_weights_of_zero_keep_the_scale_that_they_have() -> None:
    assert least_error_ratio(torch.zeros(3, 4), ChannelLayout(), 8, True).tolist() == [1.0] * 3


def test_a_large_weight_is_searched_in_pieces_of_its_rows() -> None:
    weight = torch.randn(700, 400)
    whole = least_error_ratio(weight, ChannelLayout(), 4, True)
    assert torch.equal(whole[600:], least_error_ratio(weight[600:], ChannelLayout(), 4, True))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("more", [{}, {"channel_wise": True}, {"group_size": 32}], ids=["tensor", "channel", "group"])
@pytest.mark.parametrize("execution", ["composite", "compiled", "integer"])
def test_training_and_evaluation_use_the_scales_with_the_least_error(algo: str, more: Any, execution: Any) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network()[:1], choices(algo, **more), x, execution=execution).train()
    weight, quantizer = model[0].weight.detach().clone(), model[0].weight_quantizer
    settings = quantizer.layout, 4, quantizer.channel_wise
    scale = arq_scale(weight, *settings).flatten() * least_error_ratio(weight, *settings)
    assert bool((scale < arq_scale(weight, *settings).flatten()).any())
    shaped = quantizer.layout.spread(scale, quantizer.layout.view(weight), quantizer.channel_wise)
    used = fake_quantize_weight(weight, shaped, quantizer.layout, 4)
    output = model(x)
    assert torch.equal(quantizer.scale.detach(), scale)
    assert torch.equal(quantizer(weight).detach(), used)
    torch.testing.assert_close(output, nn.functional.linear(model[0].input_quantizer(x), used, model[0].bias))
    torch.testing.assert_close(model.eval()(x), output)


@pytest.mark.parametrize("execution", ["composite", "compiled", "integer"])
def test_max_abs_scales_keep_their_share_while_the_weight_is_trained(execution: Any) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network(), choices("arq_retrain", channel_wise=True), x, execution=execution).train()
    model(x)
    quantizer = model[0].weight_quantizer
    ratio = quantizer.ratio.clone()
    for _ in range(2):
        step(model, x)
    model(x)
    weight = model[0].weight.detach()
    assert torch.equal(quantizer.ratio, ratio)
    assert torch.equal(quantizer.scale, arq_scale(weight, ChannelLayout(), 4, True).flatten() * ratio)
    assert not torch.equal(ratio, least_error_ratio(weight, ChannelLayout(), 4, True))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_that_is_continued_from_its_state_is_equal_to_the_bit(algo: str) -> None:
    x = torch.randn(8, 64)
    first: Any = prepare_qat(network(), choices(algo, group_size=32), x).train()
    step(first, x)
    step(first, x)
    config = find_plan(first)
    assert config is not None
    plan = QuantPlan.from_dict(config[1].to_dict())
    assert plan == config[1] and plan.config["0"].retrain_weight_config.init == "mse"
    second: Any = prepare_qat(network(), plan.config, x).train()
    second.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
    for model in (first, second, copy.deepcopy(first)):
        step(model, x)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert str(QuantRecord.from_model(first)) == str(QuantRecord.from_model(second))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_calibrating_finds_the_scales_so_that_evaluations_need_not_search(algo: str) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network(), choices(algo), x)
    assert model[0].weight_quantizer.starting
    calibrate(model, [x])
    assert not model[0].weight_quantizer.starting


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("trained", [False, True])
def test_the_record_and_an_export_have_them(algo: str, trained: bool, tmp_path: Path) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network(), choices(algo), x)
    if trained:
        step(model.train(), x)
    calibrate(model.eval(), [x])
    record = QuantRecord.from_model(model)
    assert list(record["0"].scale_w) == model[0].weight_quantizer.compute_scale(model[0].weight).tolist()
    assert record["0"].scale_w < QuantRecord.from_model(prepared_with_max_abs(x))["0"].scale_w
    export_onnx(model, tmp_path / "net.onnx", x)
    assert verify_export(model, {"qdq": tmp_path / "net.onnx"}, [x]).ok


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_freezing_and_forgetting(algo: str) -> None:
    model: Any = prepare_qat(network(), choices(algo, channel_wise=True), torch.ones(1, 64))
    quantizer, weight = model[0].weight_quantizer, model[0].weight.detach()
    quantizer.freeze(weight)
    wanted = quantizer.max_abs_scale(weight) * least_error_ratio(weight, ChannelLayout(), 4, True)
    assert torch.equal(quantizer.scale.detach(), wanted) and not quantizer.starting
    quantizer.reset_parameters()
    assert quantizer.starting


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_graph_that_torch_exports_has_them(algo: str) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network(), choices(algo), x)
    calibrate(model, [x])
    program = torch.export.export(model.eval(), (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), model(x))


def test_the_default_has_the_quantizer_and_the_state_that_it_had() -> None:
    for config in ({}, {"weights": {"init": "max_abs"}}, {"weights": {"init": None}}):
        model: Any = prepare_qat(network(), config, torch.ones(1, 64))
        assert type(model[0].weight_quantizer) is WeightQuantizer
        assert list(model[0].weight_quantizer.state_dict()) == ["scale", "scale_frozen", "offset"]
        found = find_plan(model)
        assert found is not None and "init" not in str(found[1].to_dict())


def test_it_is_set_per_layer() -> None:
    config = {"layers": {"2": {"weights": {"init": "mse"}}}}
    model: Any = prepare_qat(network(), config, torch.ones(1, 64))
    assert [type(model[i].weight_quantizer).__name__ for i in (0, 2)] == ["WeightQuantizer", "RatioWeightQuantizer"]


def test_recurrent_layers_have_it() -> None:
    x = torch.randn(2, 3, 8)
    model: Any = prepare_qat(Recurrent(), choices("arq_retrain", dst_type="INT8"), x).train()
    model(x).sum().backward()
    assert not model.lstm.weight_quantizer.starting and not model.lstm.recurrent_weight_quantizer.starting


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'weights.init' must be 'max_abs' or 'mse', found 'mae'"):
        load_config({"weights": {"init": "mae"}})


def test_the_files_of_amct_refuse_it(tmp_path: Path) -> None:
    model, x = network(), torch.ones(1, 64)
    raw = {"version": 1, "batch_num": 1, "0": {"retrain_enable": True, "retrain_weight_config": {"init": "mse"}}}
    with pytest.raises(ValueError, match=r"layer '0', key 'retrain_weight_config.init': AMCT's files have no choice"):
        prepare_qat(model, raw, x)
    file = tmp_path / "my.cfg"
    file.write_text('retrain_weight_quant_config: { arq_retrain: { init: "mse" } }')
    with pytest.raises(ValueError, match=r"my\.cfg.*init"):
        prepare_qat(model, file, x)


def test_a_state_of_amct_is_refused_for_scales_that_it_does_not_have() -> None:
    x = torch.ones(1, 64)
    config = RetrainConfig(layers={"0": LayerConfig(retrain_weight_config=WeightConfig(init="mse"))})
    model = prepare_qat(network(), config, x)
    with pytest.raises(ValueError, match=r"'0'.*init: mse"):
        convert_amct_state_dict({"0.quant_module.acts_clip_max": torch.ones(1)}, model)


@pytest.mark.parametrize("deploy_grid", [False, True])
def test_an_evaluation_takes_the_shares_that_were_loaded_since_the_last(deploy_grid: bool) -> None:
    x = torch.randn(8, 64)
    model: Any = prepare_qat(network(), choices("arq_retrain"), x, deploy_grid=deploy_grid)
    calibrate(model, [x])
    state = copy.deepcopy(model.eval().state_dict())
    with torch.no_grad():
        before = model(x)
        state["0.weight_quantizer.ratio"].fill_(0.3)
        model.load_state_dict(state)
        assert not torch.equal(model(x), before)
