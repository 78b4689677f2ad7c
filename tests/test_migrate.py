"""AMCT's state_dict against that of this package: the recorded AMCT models go on here with AMCT's numbers."""

from __future__ import annotations

import dataclasses
import json
import warnings
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, RetrainConfig, convert_amct_state_dict, quantized_layers
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.make_plan import make_plan
from tests.golden_data import ALL_CASES, MODEL_CASES, ModelCase, model_case
from tests.golden_exceptions import MODEL_CASES as EXCEPTIONS
from tests.sums import SumsRoundedOnce

EVAL_TOLERANCE = 1e-4  # of the range of the output
SCALE_TOLERANCE = 1e-4  # relative

CONVERTED_CASES = [name for name, meta in ALL_CASES.items() if meta.get("state_dict")]
"""The cases that AMCT converts, those that it then fails to train included."""

trained_case = pytest.mark.parametrize("name", MODEL_CASES)
converted_case = pytest.mark.parametrize("name", CONVERTED_CASES)


def convert(case: ModelCase) -> nn.Module:
    """Convert as AMCT did, INT4 weights that cannot be packed included."""
    config, model = RetrainConfig.from_dict(json.loads(case.meta["config_used"])), case.float_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*INT8 is used instead of INT4.*")
        plan = make_plan(model, config, case.group("cal/"))
    if "cannot be packed" in EXCEPTIONS.get(case.meta["case"], ("",))[0]:
        plan = dataclasses.replace(plan, config=config)
    convert_layers(model, plan)
    return model


def amct_state(case: ModelCase) -> dict[str, Tensor]:
    """The state after training as recorded: without ``wts_mask`` and the copies of shared quantizers."""
    prefix = "final/"
    return {key.removeprefix(prefix): value for key, value in case.tensors.items() if key.startswith(prefix)}


@cache
def migrated(name: str) -> nn.Module:
    case = model_case(name)
    model = convert(case)
    model.load_state_dict(convert_amct_state_dict(amct_state(case), model))
    return model.eval()


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for key, value in left.items():
        assert value.dtype == right[key].dtype, key
        assert torch.equal(value.nan_to_num(), right[key].nan_to_num()), key
        assert torch.equal(value.isnan(), right[key].isnan()), key


class TestAgainstAmct:
    """Every recorded model, after AMCT has trained it."""

    @trained_case
    def test_the_output_in_evaluation(self, name: str) -> None:
        """AMCT resets the lower clip of non-negative inputs and repairs ranges in each forward, as here."""
        case = model_case(name)
        expected = case.tensors["eval_out"]
        with SumsRoundedOnce():
            output = case.evaluate(migrated(name))
        error = (output - expected).abs().max() / (expected.max() - expected.min())
        assert float(error) <= EVAL_TOLERANCE

    @pytest.mark.parametrize("name", [n for n in MODEL_CASES if n != "cnn_bn_relu__fp16_mode_cfg"])
    def test_the_record(self, name: str) -> None:
        """To the last bit: scales, offsets and the folding of BatchNorm are elementwise."""
        assert QuantRecord.from_model(migrated(name)) == model_case(name).record

    def test_the_record_with_fp16_scales_which_amct_does_not_round(self) -> None:
        name = "cnn_bn_relu__fp16_mode_cfg"
        here, there = QuantRecord.from_model(migrated(name)), model_case(name).record
        for key, layer in there.items():
            assert here[key].scale_d == pytest.approx(layer.scale_d, rel=2**-10)
            assert list(here[key].scale_w) == pytest.approx(list(layer.scale_w), rel=SCALE_TOLERANCE)

    @trained_case
    def test_no_layer_calibrates_again(self, name: str) -> None:
        for layer in quantized_layers(migrated(name)).values():
            assert not any(layer.get_quantizer(name).calibrating for name in layer.activation_quantizers)

    @converted_case
    def test_names_order_shapes_and_types_are_amct_s(self, name: str) -> None:
        model = convert(model_case(name))
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        found = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()]
        assert found == ALL_CASES[name]["state_dict"]

    @trained_case
    def test_all_that_amct_has_learned_comes_back(self, name: str) -> None:
        case = model_case(name)
        model, there = convert(case), amct_state(case)
        model.load_state_dict(convert_amct_state_dict(there, model))
        back = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        # The counter stops at batch_num here; the factors noted are those of the clips, not of the forward before;
        # a recurrent layer's trained biases also go where AMCT leaves the initial ones.
        derived = ("cur_batch", "acts_scale", "acts_offset", "acts_h_scale", "acts_h_offset")
        replaced = ("replaced_module.bias_ih_l0", "replaced_module.bias_hh_l0")
        assert [
            key for key in there if not key.endswith(derived + replaced) and not torch.equal(back[key], there[key])
        ] == []


class TestRoundTrip:
    """To AMCT's names and back changes nothing."""

    @converted_case
    def test_of_a_fresh_model(self, name: str) -> None:
        model = convert(model_case(name))
        own = model.state_dict()
        assert_equal(convert_amct_state_dict(convert_amct_state_dict(own, model, to_amct=True), model), own)

    @trained_case
    def test_of_a_trained_model(self, name: str) -> None:
        model = migrated(name)
        own = model.state_dict()
        assert_equal(convert_amct_state_dict(convert_amct_state_dict(own, model, to_amct=True), model), own)


class TestWhatAmctStartsWith:
    def test_state_without_counterpart(self) -> None:
        model = convert(model_case("cnn_bn_relu__channel_wise_false_cfg"))
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        assert state["conv1.scale_w"].tolist() == [1.0] * 8  # one scale, spread over the channels of the BatchNorm
        assert state["conv1.offset_w"].tolist() == [0.0] * 8
        assert state["conv1.quant_module.wts_mask"].isnan().all()
        assert state["conv1.quant_module.acts_scale"].isnan()
        zeros = ("quant_module.cur_batch", "quant_module.prune_cur_batch", "quant_module.s_rec_flag")
        assert not any(state[f"conv1.{name}"] for name in (*zeros, "record_module.quant_layer_num"))

    def test_a_calibrated_model_is_ready_for_amct_s_evaluation(self) -> None:
        model = migrated("cnn_bn_relu__default")
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        assert state["conv2.quant_module.cur_batch"] == 1
        assert state["conv2.record_module.quant_layer_num"] == 3
        assert state["conv2.quant_module.acts_scale"] == model.conv2.input_quantizer.scale
        assert state["conv2.quant_module.acts_offset"] == -128


class TestSharedQuantizers:
    CASE = "res_down__default"

    def test_the_member_has_its_owner_s_state_under_its_own_name(self) -> None:
        case = model_case(self.CASE)
        state = convert_amct_state_dict(amct_state(case), convert(case))
        for name in ("clip_max", "clip_min", "clip_max_previous", "clip_min_previous", "calibrated_batches"):
            assert state[f"block.down.0.input_quantizer.{name}"] is state[f"block.conv1.input_quantizer.{name}"]
        assert (
            state["block.conv1.input_quantizer.clip_max"]
            == case.tensors["final/block.conv1.quant_module.acts_clip_max"]
        )

    def test_the_copies_in_amct_s_member_are_the_owner_s(self) -> None:
        model = migrated(self.CASE)
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        copies = [key for key in state if "acts_comp_reuse" in key]
        assert copies
        for key in copies:
            owner = state[key.replace("block.down.0.quant_module.acts_comp_reuse", "block.conv1.quant_module")]
            assert torch.equal(state[key].nan_to_num(), owner.nan_to_num())

    def test_a_complete_state_with_copies_is_read_too(self) -> None:
        case, model = model_case(self.CASE), migrated(self.CASE)
        complete = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        assert len(complete) > len(amct_state(case))
        assert_equal(convert_amct_state_dict(complete, model), model.state_dict())


class TestRecurrentLayers:
    def test_the_biases_that_amct_trains_are_taken(self) -> None:
        case = model_case("lstm__default")
        there, model = amct_state(case), convert(case)
        state = convert_amct_state_dict(there, model)
        trained, initial = (there[f"rnn.quant_module.{part}.bias_ih_l0"] for part in ("comp_module", "replaced_module"))
        assert not torch.equal(trained, initial)
        assert torch.equal(state["rnn.bias_ih_l0"], trained)

    def test_amct_exports_from_where_it_does_not_train_so_both_copies_are_written(self) -> None:
        model = migrated("gru__default")
        state = convert_amct_state_dict(model.state_dict(), model, to_amct=True)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            for part in ("replaced_module", "comp_module"):
                assert torch.equal(state[f"rnn.quant_module.{part}.{name}"], getattr(model.rnn, name))

    @pytest.mark.parametrize(("name", "gates"), [("lstm__pertensor", 4), ("gru__pertensor_momentum", 3)])
    def test_one_scale_stands_there_once_per_gate(self, name: str, gates: int) -> None:
        model = migrated(name)
        assert model.rnn.weight_quantizer.scale.shape == (1,)
        there = convert_amct_state_dict(model.state_dict(), model, to_amct=True)["rnn.quant_module.wts_scales"]
        assert there.tolist() == model.rnn.weight_quantizer.scale.tolist() * gates
