"""What is exported is proven to be what was trained: recorded networks in all forms, others on the device's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amct_lightning import export_onnx, prepare_qat, verify_export
from amct_lightning.export.onnx_file import export_forms
from tests.architectures.models import ARCHITECTURES, Architecture
from tests.export.golden import golden_export
from tests.export.golden_files import EXPORTED
from tests.export.test_architectures import evaluated
from tests.golden_data import model_case

MODELS = sorted({name.split("__")[0] for name in EXPORTED})
WRONGLY_TRANSLATED = {"LongformerForSequenceClassification": "what it reads differs"}
"""Torch's exporter writes in-place changes of slices wrongly there, which the verification finds."""


@pytest.mark.parametrize("name", EXPORTED)
def test_all_forms_of_a_recorded_network_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    golden = golden_export(name, tmp_path)
    files: Any = {form: tmp_path / f"{form}.onnx" for form in ("deploy", "fake_quant", "qdq")}
    export_forms(golden.model, files, golden.input_data)
    report = verify_export(golden.model, files, [golden.input_data])
    assert report.ok, str(report)


def test_files_under_the_name_of_another_form_are_refused(tmp_path: Path) -> None:
    golden = golden_export("mlp__a16w8_json", tmp_path)
    files: Any = {form: tmp_path / f"{form}.onnx" for form in ("deploy", "fake_quant", "qdq")}
    export_forms(golden.model, files, golden.input_data)
    for form, own in (("deploy", "qdq"), ("qdq", "fake_quant"), ("fake_quant", "deploy")):
        with pytest.raises(ValueError, match=rf"{own}\.onnx' is of the form {own}, not {form}"):
            verify_export(golden.model, {form: files[own]}, [golden.input_data])
    with pytest.raises(TypeError, match="files is a str; it must map forms to files"):
        verify_export(golden.model, str(files["qdq"]), [golden.input_data])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_on_the_grid_a_deployed_network_is_the_model_to_the_bit(name: str, tmp_path: Path) -> None:
    case = model_case(f"{name}__default")
    model = prepare_qat(case.float_model(), None, case.group("cal/"), deploy_grid=True)
    case.train(model)
    inputs = case.group("eval_x/")
    file = export_onnx(model.eval(), tmp_path / "deploy.onnx", inputs, "deploy").path
    report = verify_export(model, {"deploy": file}, [inputs])
    assert report.ok, str(report)
    (form,) = report.forms
    assert [layer.codes_flipped for layer in form.layers] == [0] * len(form.layers)
    assert [output.largest for output in form.outputs] == [0.0] * len(form.outputs)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if str(a) != "MixtralForCausalLM"], ids=str)
def test_on_the_grid_an_architecture_keeps_every_code(architecture: Architecture, tmp_path: Path) -> None:
    model, inputs = evaluated(architecture, deploy_grid=True)
    file = export_onnx(model, tmp_path / "deploy.onnx", inputs, "deploy").path
    report = verify_export(model, {"deploy": file}, [inputs])
    wrong = WRONGLY_TRANSLATED.get(str(architecture))
    if wrong is not None:
        assert wrong in str(report.first_departure)
        return
    assert report.ok, str(report)
    assert sum(layer.codes_flipped or 0 for form in report.forms for layer in form.layers) == 0
