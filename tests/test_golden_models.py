"""Whole training runs against AMCT: the same files, the same losses, the same factors."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from amct_lightning import QuantRecord, RetrainConfig, create_quant_retrain_config
from amct_lightning.graph.convert import convert_layers
from amct_lightning.graph.plan import make_plan
from tests.golden_data import FAILS_IN_TRAINING, MODEL_CASES, ModelCase, Run, model_case, run_model_case
from tests.golden_exceptions import AGREE_WITH_INT4_WEIGHTS_KEPT
from tests.golden_exceptions import MODEL_CASES as EXCEPTIONS

LOSS_TOLERANCE = 1e-5
EVAL_TOLERANCE = 1e-4  # of the range of the output
SCALE_TOLERANCE = 1e-4  # relative

every_case = pytest.mark.parametrize("name", MODEL_CASES)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Every case is run once for all tests."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = run_model_case(model_case(name), tmp_path_factory.mktemp(name))
        return runs[name]

    return run


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


def first_error(first_out: torch.Tensor, case: ModelCase) -> float:
    return float((first_out - case.tensors["out/0"]).abs().max())


def eval_error(eval_out: torch.Tensor, case: ModelCase) -> float:
    expected = case.tensors["eval_out"]
    return float((eval_out - expected).abs().max() / (expected.max() - expected.min()))


def scale_error(record: QuantRecord, case: ModelCase, field: str) -> float:
    def values(layer: object) -> list[float]:
        value = getattr(layer, field)
        return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]

    return max(relative_error(values(record[name]), values(layer)) for name, layer in case.record.items())


@pytest.mark.parametrize("name", [n for n in MODEL_CASES if not model_case(n).meta.get("simple_cfg")])
def test_the_generated_config_equals_amct_s_to_the_byte(name: str, tmp_path: Path) -> None:
    case, path = model_case(name), tmp_path / "config.json"
    create_quant_retrain_config(str(path), case.float_model(), case.group("cal/"))
    assert path.read_bytes() == case.meta["config_generated"].encode()


@every_case
def test_the_output_of_the_first_step(name: str, run_of: Callable[[str], Run]) -> None:
    error = first_error(run_of(name).first_out, model_case(name))
    expect(name, "first", error <= LOSS_TOLERANCE, error)


@every_case
def test_the_loss_of_every_step(name: str, run_of: Callable[[str], Run]) -> None:
    error = loss_error(run_of(name).losses, model_case(name))
    expect(name, "loss", error <= LOSS_TOLERANCE, error)


@every_case
def test_the_output_in_evaluation(name: str, run_of: Callable[[str], Run]) -> None:
    error = eval_error(run_of(name).eval_out, model_case(name))
    expect(name, "eval", error <= EVAL_TOLERANCE, error)


@every_case
def test_the_layers_of_the_record_and_their_order(name: str, run_of: Callable[[str], Run]) -> None:
    here, there = list(run_of(name).record), list(model_case(name).record)
    expect(name, "keys", here == there, (here, there))


@every_case
def test_the_types_in_the_record(name: str, run_of: Callable[[str], Run]) -> None:
    here, there = (
        {key: (layer.act_type, layer.wts_type) for key, layer in record.items()}
        for record in (run_of(name).record, model_case(name).record)
    )
    expect(name, "types", here == there, (here, there))


@every_case
def test_the_offsets_in_the_record(name: str, run_of: Callable[[str], Run]) -> None:
    here, there = (
        {key: (layer.offset_d, layer.offset_w, layer.offset_h, layer.offset_r) for key, layer in record.items()}
        for record in (run_of(name).record, model_case(name).record)
    )
    expect(name, "offsets", here == there, (here, there))


@pytest.mark.parametrize("field", ["scale_d", "scale_w", "scale_h", "scale_r"])
@every_case
def test_the_scales_in_the_record(name: str, field: str, run_of: Callable[[str], Run]) -> None:
    error = scale_error(run_of(name).record, model_case(name), field)
    expect(name, field, error <= SCALE_TOLERANCE, error)


@pytest.mark.parametrize("name", [n for n in MODEL_CASES if n not in EXCEPTIONS])
def test_the_record_file_equals_amct_s_to_the_byte(name: str, run_of: Callable[[str], Run]) -> None:
    assert run_of(name).record_text == model_case(name).meta["record_text"]


@every_case
def test_the_original_model_is_unchanged(name: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(name)
    assert list(run.float_state_after) == list(run.float_state_before)
    assert all(torch.equal(run.float_state_after[k], v) for k, v in run.float_state_before.items())


@pytest.mark.parametrize("name", AGREE_WITH_INT4_WEIGHTS_KEPT)
def test_only_the_packing_rule_keeps_int4_weights_from_equalling_amct(name: str, tmp_path: Path) -> None:
    case, path = model_case(name), tmp_path / "config.json"
    path.write_text(case.meta["config_used"])
    config, model = RetrainConfig.from_json(path), case.float_model()
    with pytest.warns(UserWarning, match="INT8 is used instead of INT4"):
        plan = make_plan(model, config, case.group("cal/"))
    plan = dataclasses.replace(plan, config=config)
    converted = copy.deepcopy(model)
    convert_layers(converted, plan)

    losses, _ = case.train(converted)
    assert loss_error(losses, case) <= LOSS_TOLERANCE
    assert eval_error(case.evaluate(converted), case) <= EVAL_TOLERANCE
    assert QuantRecord.from_model(converted).allclose(case.record, SCALE_TOLERANCE)


def test_force_fp16_quant_rounds_amct_s_scale_to_float16(run_of: Callable[[str], Run]) -> None:
    name = "cnn_bn_relu__fp16_mode_cfg"
    for key, layer in model_case(name).record.items():
        assert math.isclose(run_of(name).record[key].scale_d, float(np.float16(layer.scale_d)), rel_tol=1e-7)


@pytest.mark.parametrize("name", FAILS_IN_TRAINING)
def test_what_amct_converts_but_cannot_train_trains_here(name: str, run_of: Callable[[str], Run]) -> None:
    run, case = run_of(name), model_case(name)
    assert len(run.losses) == case.meta["steps"]
    assert all(math.isfinite(loss) for loss in run.losses)
    assert sorted(run.record) == sorted(layer["name"] for layer in case.meta["quantized_layers"])


def test_every_exception_names_a_case_that_exists() -> None:
    assert set(EXCEPTIONS) <= set(MODEL_CASES)
