"""Translating between AMCT's state_dict and that of this package: calibration, names, and states that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import RetrainConfig, convert_amct_state_dict, prepare_qat, quantized_layers
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig
from tests.golden_data import model_case
from tests.test_migrate import amct_state, assert_equal, convert

NAN = float("nan")


def small_model(batch_num: int = 1, data: DataConfig | None = None, weight: WeightConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    layer = LayerConfig(True, data or DataConfig(), weight or WeightConfig())
    config = RetrainConfig(batch_num=batch_num, layers={"0": layer, "2": layer})
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return prepare_qat(model, config, torch.ones(1, 4))


def as_amct_starts(model: nn.Module) -> dict[str, Tensor]:
    """The state of an AMCT model right after the conversion: clips 1/1, everything else NaN or zero."""
    state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
    for key, value in state.items():
        leaf = key.rpartition(".")[2]
        if leaf in ("acts_clip_max", "acts_clip_min"):
            state[key] = torch.tensor(1.0)
        elif leaf.endswith(("_pre", "wts_scales", "wts_offsets")) or leaf in ("acts_scale", "acts_offset"):
            state[key] = torch.full_like(value, NAN)
    return state


class TestRoundTrip:
    """To AMCT's names and back changes nothing."""

    @pytest.mark.parametrize("steps", [0, 1, 2, 3])
    @pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
    @pytest.mark.parametrize("clip", [{}, {"clip_max": 1.0, "clip_min": -1.0}], ids=["calibrated", "given_clips"])
    def test_at_any_point_of_the_calibration(self, steps: int, algo: str, clip: dict[str, float]) -> None:
        model = small_model(batch_num=3, data=DataConfig(**clip), weight=WeightConfig(algo=algo))
        for _ in range(steps):
            model(torch.randn(4, 4))
        own = model.state_dict()
        again = small_model(batch_num=3, data=DataConfig(**clip), weight=WeightConfig(algo=algo))
        again.load_state_dict(convert_amct_state_dict(convert_amct_state_dict(own, model, to_amct=True), again))
        assert_equal(again.state_dict(), own)
        for layer, twin in zip(quantized_layers(model).values(), quantized_layers(again).values(), strict=True):
            assert layer.input_quantizer.calibrating == twin.input_quantizer.calibrating == (not clip and steps < 3)
            if algo == "ulq_retrain":
                assert layer.weight_quantizer.starting == twin.weight_quantizer.starting == (steps == 0)

    def test_the_search_for_shifts_which_amct_does_not_have_starts_anew(self) -> None:
        model = prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4), search_n=True)
        model.train()(torch.randn(4, 4))
        model.eval()(torch.randn(4, 4))
        there = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        assert not [key for key in there if "shift" in key]
        back = convert_amct_state_dict(there, model)
        assert list(back) == list(model.state_dict())
        assert not back["0.shift_search.batches"]


class TestCalibration:
    """A quantizer is calibrated after the migration exactly if it was in AMCT."""

    @pytest.mark.parametrize(
        ("batch_num", "cur_batch", "calibrated"),
        [(1, 0, False), (1, 1, True), (3, 2, False), (3, 3, True), (3, 50, True), (150, 99, False), (150, 100, True)],
    )
    def test_by_the_counter_of_forwards_which_stops_at_100(
        self, batch_num: int, cur_batch: int, calibrated: bool
    ) -> None:
        model = small_model(batch_num)
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        state["0.quant_module.cur_batch"] = torch.tensor(float(cur_batch))
        model.load_state_dict(convert_amct_state_dict(state, model))
        first, second = quantized_layers(model).values()
        assert first.input_quantizer.calibrating == (not calibrated)
        assert second.input_quantizer.calibrating

    def test_clips_of_the_configuration_need_none(self) -> None:
        model = small_model(5, DataConfig(clip_max=2.0, clip_min=-1.0))
        state = as_amct_starts(model)
        state["0.quant_module.acts_clip_max"] = torch.tensor(2.0)
        state["0.quant_module.acts_clip_min"] = torch.tensor(-1.0)
        model.load_state_dict(convert_amct_state_dict(state, model))
        quantizer = model[0].input_quantizer
        assert not quantizer.calibrating
        assert (quantizer.clip_max_previous, quantizer.clip_min_previous) == (2.0, -1.0)

    @pytest.mark.parametrize("algo", ["arq_retrain", "ulq_retrain"])
    def test_a_model_that_amct_never_ran_has_no_nan_and_trains_like_a_fresh_one(self, algo: str) -> None:
        fresh, model = (small_model(weight=WeightConfig(algo=algo)) for _ in range(2))
        model.load_state_dict(convert_amct_state_dict(as_amct_starts(model), model))
        assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
        x = torch.randn(4, 4)
        assert torch.equal(model(x), fresh(x))
        assert_equal(model.state_dict(), fresh.state_dict())

    def test_learned_weight_scales_are_kept(self) -> None:
        model = small_model(weight=WeightConfig(algo="ulq_retrain"))
        model(torch.randn(4, 4))
        with torch.no_grad():
            model[0].weight_quantizer.scale.fill_(0.25)
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        again = small_model(weight=WeightConfig(algo="ulq_retrain"))
        again.load_state_dict(convert_amct_state_dict(state, again))
        again(torch.randn(4, 4))
        assert again[0].weight_quantizer.scale.item() == 0.25


class TestNames:
    def test_the_prefix_of_ddp_is_removed(self) -> None:
        case = model_case("mlp__default")
        model, state = convert(case), amct_state(case)
        prefixed = {f"module.{key}": value for key, value in state.items()}
        assert_equal(convert_amct_state_dict(prefixed, model), convert_amct_state_dict(state, model))

    def test_a_model_whose_own_names_begin_with_module_keeps_them(self) -> None:
        model = nn.Sequential()
        model.add_module("module", nn.Linear(4, 2))
        model = prepare_qat(model, None, torch.ones(1, 4))
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        assert next(iter(state)) == "module.scale_w"
        assert_equal(convert_amct_state_dict(state, model), model.state_dict())

    def test_of_a_wrapper_the_converted_module_counts(self) -> None:
        case = model_case("mlp__default")
        wrapper = nn.Sequential(convert(case))
        assert list(convert_amct_state_dict(amct_state(case), wrapper)) == list(wrapper[0].state_dict())

    def test_other_layers_and_buffers_keep_their_names_and_place(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
        model = prepare_qat(model, None, torch.ones(2, 4))
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        others = [key for key in state if key.startswith(("1.", "2.0."))]
        assert others == [key for key in model.state_dict() if key.startswith(("1.", "2.0."))]


def bad_state(change: Any) -> tuple[dict[str, Tensor], nn.Module]:
    case = model_case("cnn_bn_relu__default")
    state = amct_state(case)
    change(state)
    return state, convert(case)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.pop("conv2.bn_module.weight"),
                r"missing \(1\): 'conv2\.bn_module\.weight'.*same configuration",
            ),
            (lambda s: s.update({"conv9.weight": torch.ones(1)}), r"unexpected \(1\): 'conv9\.weight'"),
            (
                lambda s: s.update({"fc.quant_module.wts_scales": torch.ones(5)}),
                r"fc\.quant_module\.wts_scales \(5,\) instead of \(1,\)",
            ),
            (lambda s: s.clear(), r"missing \(57\): 'conv1\.scale_w', .*' and 49 more"),
        ],
        ids=["missing", "unexpected", "shape", "empty"],
    )
    def test_names_and_shapes_are_listed(self, change: Any, message: str) -> None:
        state, model = bad_state(change)
        with pytest.raises(ValueError, match=message):
            convert_amct_state_dict(state, model)

    def test_a_model_converted_with_another_configuration(self) -> None:
        with pytest.raises(
            ValueError, match=r"missing \(6\): 'conv2\.weight', .*unexpected \(20\): 'conv2\..* and 12 more"
        ):
            convert_amct_state_dict(
                amct_state(model_case("cnn_bn_relu__default")), convert(model_case("cnn_bn_relu__conv2_disabled"))
            )

    def test_the_state_of_this_package_given_as_amct_s(self) -> None:
        model = small_model()
        with pytest.raises(ValueError, match=r"as AMCT converts it.*unexpected \(\d+\): '0\.weight'"):
            convert_amct_state_dict(model.state_dict(), model)

    def test_amct_s_state_given_as_that_of_this_package(self) -> None:
        model = small_model()
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        with pytest.raises(ValueError, match=r"of the converted Sequential.*missing \(\d+\): '0\.weight'"):
            convert_amct_state_dict(state, model, to_amct=True)

    def test_a_float_model(self) -> None:
        with pytest.raises(ValueError, match=r"Linear is not converted.*create_quant_retrain_model"):
            convert_amct_state_dict({}, nn.Linear(2, 2))

    @pytest.mark.parametrize("to_amct", [False, True])
    @pytest.mark.parametrize(
        ("model", "x", "reason"),
        [
            (nn.Sequential(*[nn.Linear(4, 4)] * 2), torch.ones(1, 4), r"layer '0' \(it is called 2 times"),
            (nn.LSTM(4, 4, bias=False), torch.ones(2, 1, 4), "it has no bias"),
        ],
        ids=["reused", "without_bias"],
    )
    def test_layers_that_amct_does_not_quantize(self, model: nn.Module, x: Tensor, reason: str, to_amct: bool) -> None:
        model = nn.Sequential(model) if isinstance(model, nn.LSTM) else model
        model = prepare_qat(model, None, x, allow_reuse=True)
        with pytest.raises(ValueError, match=f"AMCT cannot quantize .*{reason}"):
            convert_amct_state_dict(model.state_dict(), model, to_amct=to_amct)

    def test_a_layer_type_that_amct_does_not_quantize(self) -> None:
        config = RetrainConfig(layers={"0": LayerConfig()})
        model = prepare_qat(nn.Sequential(nn.ConvTranspose3d(1, 1, 1)), config, torch.ones(1, 1, 2, 2, 2))
        with pytest.raises(ValueError, match="it is a QATConvTranspose3d"):
            convert_amct_state_dict(model.state_dict(), model, to_amct=True)
