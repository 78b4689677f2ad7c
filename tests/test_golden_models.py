"""Whole training runs against AMCT: the same files, the same losses, the same factors; on every machine.

Three kinds of comparison, by what the numbers depend on:

- Text, names, types, integers and whatever elementwise arithmetic gives is equal to the byte everywhere.
- What follows from sums of floats is compared step by step, each from the recorded state, with sums that are the same
  on every machine (``tests/sums.py``), within the error that a float32 sum of so many terms can have.
- On a machine that adds in the order of a recording (its *float* network repeats the recorded losses) a whole run with
  the machine's own sums is equal to the byte.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from amct_lightning import QuantRecord, RetrainConfig, create_quant_retrain_config, create_quant_retrain_model
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.make_plan import make_plan
from tests.golden_data import FAILS_IN_TRAINING, MODEL_CASES, ModelCase, Run, model_case, run_model_case
from tests.golden_exceptions import AGREE_WITH_INT4_WEIGHTS_KEPT, ROUNDED_THE_OTHER_WAY
from tests.golden_exceptions import MODEL_CASES as EXCEPTIONS
from tests.golden_states import (
    RECORDINGS,
    REPEATED,
    Step,
    Training,
    assert_recorded,
    final_state,
    recorded_states,
    recorded_steps,
    recording_of_this_machine,
)
from tests.sums import UNIT_ROUNDOFF, SumsRoundedOnce, sum_error

LOSS_TOLERANCE = 1e-5
EVAL_TOLERANCE = 1e-4  # of the range of the output
SCALE_TOLERANCE = 1e-4  # relative

every_case = pytest.mark.parametrize("name", MODEL_CASES)
every_repeated_case = pytest.mark.parametrize("name", REPEATED)
every_exception = pytest.mark.parametrize("name", EXCEPTIONS)

RunOf = Callable[[str], Run]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """Every case is run once for all tests, with the sums of this machine."""
    return cache(lambda name: run_model_case(model_case(name), tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def same_run_of(tmp_path_factory: pytest.TempPathFactory) -> RunOf:
    """The same with sums that are equal on every machine."""

    def run(name: str) -> Run:
        with SumsRoundedOnce():
            return run_model_case(model_case(name), tmp_path_factory.mktemp(name))

    return cache(run)


class TestExactEverywhere:
    @pytest.mark.parametrize("name", [n for n in MODEL_CASES if not model_case(n).meta.get("simple_cfg")])
    def test_the_generated_config_equals_amct_s_to_the_byte(self, name: str, tmp_path: Path) -> None:
        case, path = model_case(name), tmp_path / "config.json"
        create_quant_retrain_config(str(path), case.float_model(), case.group("cal/"))
        assert path.read_bytes() == case.meta["config_generated"].encode()

    @every_repeated_case
    def test_the_record_file_of_the_recorded_weights_equals_amct_s_to_the_byte(self, name: str, tmp_path: Path) -> None:
        """Scales, offsets and the folding of BatchNorm are elementwise, so the same weights give the same text."""
        case, config, record = model_case(name), tmp_path / "config.json", tmp_path / "record.txt"
        config.write_text(case.meta["config_used"])
        model = create_quant_retrain_model(str(config), case.float_model(), str(record), case.group("cal/"))
        model.load_state_dict(final_state(Training(case)))
        case.evaluate(model)
        assert record.read_text() == case.meta["record_text"]

    @every_case
    def test_the_layers_of_the_record_and_their_order(self, name: str, run_of: RunOf) -> None:
        assert list(run_of(name).record) == list(model_case(name).record)

    @every_case
    def test_the_types_in_the_record(self, name: str, run_of: RunOf) -> None:
        here, there = (
            {key: (layer.act_type, layer.wts_type) for key, layer in record.items()}
            for record in (run_of(name).record, model_case(name).record)
        )
        expect(name, "types", here == there, (here, there))

    @every_case
    def test_the_original_model_is_unchanged(self, name: str, run_of: RunOf) -> None:
        run = run_of(name)
        assert list(run.float_state_after) == list(run.float_state_before)
        assert all(torch.equal(run.float_state_after[k], v) for k, v in run.float_state_before.items())

    @pytest.mark.parametrize("name", FAILS_IN_TRAINING)
    def test_what_amct_converts_but_cannot_train_trains_here(self, name: str, run_of: RunOf) -> None:
        run, case = run_of(name), model_case(name)
        assert len(run.losses) == case.meta["steps"]
        assert all(math.isfinite(loss) for loss in run.losses)
        assert sorted(run.record) == sorted(layer["name"] for layer in case.meta["quantized_layers"])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One step from a recorded state beside the recorded step."""

    errors: dict[str, float]
    """Of the output, the loss and the state after the step; relative."""
    allowed: float
    worst: str
    """The tensor of the state with the largest error."""


@cache
def compared_steps(name: str) -> list[Comparison]:
    """Do every step of a run again, each from the recorded state, with sums that are the same everywhere."""
    comparisons = []
    for number, training, after in recorded_steps(name):
        with SumsRoundedOnce() as mode:
            step = training.step(number)
        comparisons.append(compare(training.case, number, step, after, sum_error(mode.terms)))
    return comparisons


def compare(case: ModelCase, number: int, step: Step, after: dict[str, Tensor], allowed: float) -> Comparison:
    """Compare a step with the recorded one.

    Where the gradients of a tensor cancel (those of a bias before a BatchNorm do altogether) the terms are as large as
    its neighbours'. So the error of a tensor is relative to the largest update of the step; and both values were
    rounded when they were added to the weight.
    """
    output, loss = case.tensors[f"out/{number}"], case.tensors["loss"][number].item()
    state = {"nothing is recorded": 0.0}
    for key, value in after.items():
        if value.is_floating_point() and value.numel():
            rounding = 2 * UNIT_ROUNDOFF * value.abs()
            error = ((step.after[key] - value).abs() - rounding).clamp(min=0)
            error[value.isnan() & step.after[key].isnan()] = 0
            state[key] = float(error.max()) / step.largest_update
    worst = max(state, key=state.__getitem__)
    errors = {
        "output": float((step.output - output).abs().max() / output.abs().max()),
        "loss": abs(step.loss - loss) / loss,
        "state": state[worst],
    }
    return Comparison(errors, allowed, worst)


class TestStepByStep:
    """From the recorded state before each step, so that nothing accumulates."""

    @pytest.mark.parametrize("what", ["output", "loss", "state"])
    @every_repeated_case
    def test_every_step(self, name: str, what: str) -> None:
        steps = compared_steps(name)
        beyond = [number for number, step in enumerate(steps) if not step.errors[what] <= step.allowed]
        exception = ROUNDED_THE_OTHER_WAY.get((name, what))
        assert beyond == ([] if exception is None else [exception]), steps

    @pytest.mark.parametrize(("name", "what"), ROUNDED_THE_OTHER_WAY)
    def test_what_was_rounded_the_other_way_is_one_step_of_16_bits_off(self, name: str, what: str) -> None:
        step = compared_steps(name)[ROUNDED_THE_OTHER_WAY[name, what]]
        assert step.errors[what] <= step.allowed + 1 / (2**15 - 1)

    @every_repeated_case
    def test_the_output_in_evaluation(self, name: str) -> None:
        training = Training(model_case(name))
        training.load(final_state(training))
        with SumsRoundedOnce() as mode:
            output = training.case.evaluate(training.model)
        expected = training.case.tensors["eval_out"]
        assert float((output - expected).abs().max() / expected.abs().max()) <= sum_error(mode.terms)

    @every_repeated_case
    def test_the_states_between_are_what_amct_recorded_of_them(self, name: str) -> None:
        training, states = Training(model_case(name)), recorded_states(name)
        assert sorted(states) == list(range(training.calibration_steps, training.case.meta["steps"]))
        for number, state in states.items():
            training.load(state)
            assert_recorded(training, "traj/", number - 1)


class TestWholeRuns:
    """A whole run, with the sums of this machine."""

    @every_repeated_case
    def test_it_equals_the_recording_where_the_order_of_sums_does(self, name: str, run_of: RunOf) -> None:
        run, machine = run_of(name), recording_of_this_machine()
        assert list(run.record) == list(model_case(name).record)
        assert all(math.isfinite(loss) for loss in run.losses)
        if machine is not None:
            recorded = RECORDINGS[machine][name]
            assert run.losses == recorded["loss"]
            assert run.record_text == recorded["record_text"]


class TestWhatDiffersOnPurpose:
    """Runs that differ in what ``golden_exceptions.py`` names, and agree in all else; sums are the same everywhere."""

    @every_exception
    def test_the_output_of_the_first_step(self, name: str, same_run_of: RunOf) -> None:
        error = float((same_run_of(name).first_out - model_case(name).tensors["out/0"]).abs().max())
        expect(name, "first", error <= LOSS_TOLERANCE, error)

    @every_exception
    def test_the_loss_of_every_step(self, name: str, same_run_of: RunOf) -> None:
        error = loss_error(same_run_of(name).losses, model_case(name))
        expect(name, "loss", error <= LOSS_TOLERANCE, error)

    @every_exception
    def test_the_output_in_evaluation(self, name: str, same_run_of: RunOf) -> None:
        error = eval_error(same_run_of(name).eval_out, model_case(name))
        expect(name, "eval", error <= EVAL_TOLERANCE, error)

    @every_exception
    def test_the_offsets_in_the_record(self, name: str, same_run_of: RunOf) -> None:
        here, there = (
            {key: (layer.offset_d, layer.offset_w, layer.offset_h, layer.offset_r) for key, layer in record.items()}
            for record in (same_run_of(name).record, model_case(name).record)
        )
        expect(name, "offsets", here == there, (here, there))

    @pytest.mark.parametrize("field", ["scale_d", "scale_w", "scale_h", "scale_r"])
    @every_exception
    def test_the_scales_in_the_record(self, name: str, field: str, same_run_of: RunOf) -> None:
        error = scale_error(same_run_of(name).record, model_case(name), field)
        expect(name, field, error <= SCALE_TOLERANCE, error)

    @pytest.mark.parametrize("name", AGREE_WITH_INT4_WEIGHTS_KEPT)
    def test_only_the_packing_rule_keeps_int4_weights_from_equalling_amct(self, name: str) -> None:
        case = model_case(name)
        config, model = RetrainConfig.from_dict(json.loads(case.meta["config_used"])), case.float_model()
        with pytest.warns(UserWarning, match="INT8 is used instead of INT4"):
            plan = make_plan(model, config, case.group("cal/"))
        plan = dataclasses.replace(plan, config=config)
        converted = copy.deepcopy(model)
        convert_layers(converted, plan)

        with SumsRoundedOnce():
            losses, _ = case.train(converted)
            assert loss_error(losses, case) <= LOSS_TOLERANCE
            assert eval_error(case.evaluate(converted), case) <= EVAL_TOLERANCE
        assert QuantRecord.from_model(converted).allclose(case.record, SCALE_TOLERANCE)

    def test_force_fp16_quant_rounds_amct_s_scale_to_float16(self, same_run_of: RunOf) -> None:
        name = "cnn_bn_relu__fp16_mode_cfg"
        for key, layer in model_case(name).record.items():
            here = same_run_of(name).record[key].scale_d
            assert math.isclose(here, float(np.float16(layer.scale_d)), rel_tol=1e-7)

    def test_every_exception_names_a_case_that_exists(self) -> None:
        assert set(EXCEPTIONS) <= set(MODEL_CASES)


def expect(name: str, aspect: str, agrees: bool, detail: object) -> None:
    reason, aspects = EXCEPTIONS.get(name, ("", frozenset()))
    if aspect in aspects:
        assert not agrees, f"{name}: '{aspect}' equals AMCT's, drop this exception ({reason})"
    else:
        assert agrees, f"{name}: '{aspect}' differs from AMCT's: {detail}"


def relative_error(here: list[float], there: list[float]) -> float:
    assert len(here) == len(there)
    return max((abs(a - b) / abs(b) for a, b in zip(here, there, strict=True)), default=0.0)


def loss_error(losses: list[float], case: ModelCase) -> float:
    return max(abs(a - b) for a, b in zip(losses, case.tensors["loss"].tolist(), strict=True))


def eval_error(eval_out: Tensor, case: ModelCase) -> float:
    expected = case.tensors["eval_out"]
    return float((eval_out - expected).abs().max() / (expected.max() - expected.min()))


def scale_error(record: QuantRecord, case: ModelCase, field: str) -> float:
    def values(layer: object) -> list[float]:
        value = getattr(layer, field)
        return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]

    return max(relative_error(values(record[name]), values(layer)) for name, layer in case.record.items())
