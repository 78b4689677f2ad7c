"""``verify_export``: what it takes, what its report says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper
from torch import Tensor, nn

from amct_lightning import verify_export
from amct_lightning.export.verify import VerifyReport
from amct_lightning.export.verify.outputs import OutputComparison
from amct_lightning.export.verify.torch_side import near_a_tie
from tests.export.golden_files import golden_case, golden_model
from tests.export.verify import faults
from tests.export.verify.qdq_files import QDQ_CASES, qdq_model
from tests.test_migrate import migrated

CASE = "cnn_bn_relu__default"


def batch(case: str = CASE) -> tuple[Tensor, ...]:
    return golden_case(case).group("eval_x/")


def saved(folder: Path, *models: tuple[str, ModelProto]) -> dict[str, Path]:
    files = {form: folder / f"{form}.onnx" for form, _ in models}
    for form, model in models:
        onnx.save(model, files[form])
    return files


def verify(folder: Path, case: str = CASE, **options: Any) -> VerifyReport:
    files = saved(folder, ("deploy", golden_model(case, "deploy")), ("fake_quant", golden_model(case, "fake_quant")))
    return verify_export(migrated(case), files, [batch(case)], **options)


class TestReport:
    def test_of_a_good_export(self, tmp_path: Path) -> None:
        report = verify(tmp_path)
        assert report.ok
        assert report.first_departure is None
        assert (report.batches, report.samples, report.deq_bits) == (1, 8, 19)
        assert [form.form for form in report.forms] == ["deploy", "fake_quant"]
        deploy = report.forms[0]
        assert [row.layer for row in deploy.layers] == ["conv1", "conv2", "fc"]
        assert [row.codes for row in deploy.layers] == [8 * 3 * 64, 8 * 8 * 64, 8 * 12]
        assert [row.outputs for row in deploy.layers] == [8 * 8 * 64, 8 * 12 * 16, 8 * 5]
        assert deploy.layers[0].codes_flipped == 0 < deploy.layers[1].codes_flipped

    def test_19_bits_of_the_scale_flip_codes_that_32_do_not(self, tmp_path: Path) -> None:
        """At 32 bits the deploy model flips what the fake-quant model flips: they compute the same."""
        whole, device = verify(tmp_path, deq_bits=32), verify(tmp_path)
        flipped = [[row.codes_flipped for row in form.layers] for form in whole.forms]
        assert flipped[0] == flipped[1]
        assert sum(row.codes_flipped for row in device.forms[0].layers) > sum(flipped[0])

    def test_gives_differences_in_steps_of_the_last_quantizer(self, tmp_path: Path) -> None:
        (output,) = verify(tmp_path, deq_bits=32).forms[0].outputs
        case = golden_case(CASE)
        record = case.record["fc"]
        codes = faults.array(golden_model(CASE, "deploy"), "fc.sub_module.weight")
        assert output.step == pytest.approx(record.scale_d * record.scale_w[0] * np.abs(codes.astype(int)).max())
        # The deploy model computes what the fake-quant model computed, of which the largest difference is recorded.
        recorded = json.loads((Path(case_folder()) / "export.json").read_text())["ort"]["max_abs_diff_vs_torch_eval"]
        assert output.largest * output.step == pytest.approx(recorded, rel=0.05)
        assert 0 < output.mean < output.largest

    def test_as_text_names_the_first_departure_and_explains_its_columns(self, tmp_path: Path) -> None:
        model = golden_model(CASE, "deploy")
        faults.set_array(model, "conv2.sub_module.weight", faults.one_more(7))
        report = verify_export(migrated(CASE), saved(tmp_path, ("deploy", model)), [batch()])
        text = str(report)
        assert not report.ok
        assert report.first_departure.layer == "conv2"
        assert "First departure: deploy: layer 'conv2': weight: 1 of 864 differ, first [0, 0, 2, 1]:" in text
        assert "Flipped: how many codes differ when the whole network runs" in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 120

    def test_as_json_is_whole_and_written_at_once(self, tmp_path: Path) -> None:
        report = verify(tmp_path)
        report.save(tmp_path / "new" / "verify.json")
        content = json.loads((tmp_path / "new" / "verify.json").read_text())
        assert content["ok"] is True
        assert content["first_departure"] is None
        assert content["forms"][0]["layers"][0]["layer"] == "conv1"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["verify.json"]

    def test_of_a_network_that_gives_nan_is_json_as_well(self, tmp_path: Path) -> None:
        model = golden_model(CASE, "deploy")
        faults.node(model, "fc.dequant").output[0] = "scores"
        nodes = [
            helper.make_node("Sub", ["scores", "scores"], ["zero"], "zero"),
            helper.make_node("Div", ["zero", "zero"], [model.graph.output[0].name], "nan"),
        ]
        model.graph.node.extend(nodes)
        report = verify_export(migrated(CASE), saved(tmp_path, ("deploy", model)), [batch()])
        assert report.first_departure.layer == "fc"
        assert json.loads(report.to_json())["forms"][0]["outputs"][0]["largest"] is None

    def test_of_several_batches_is_their_sum(self, tmp_path: Path) -> None:
        files = saved(tmp_path, ("deploy", golden_model(CASE, "deploy")))
        one, two = (verify_export(migrated(CASE), files, [batch()] * count) for count in (1, 2))
        assert (two.batches, two.samples) == (2, 16)
        for row, twice in zip(one.forms[0].layers, two.forms[0].layers, strict=True):
            assert (2 * row.codes, 2 * row.codes_flipped) == (twice.codes, twice.codes_flipped)
        assert two.forms[0].outputs[0].mean == pytest.approx(one.forms[0].outputs[0].mean)


def case_folder() -> Path:
    from tests.golden_data import GOLDEN

    return GOLDEN / "models_data" / CASE


class TestModel:
    def test_is_as_before_afterwards(self, tmp_path: Path) -> None:
        model = migrated(CASE).train()
        try:
            before = {key: value.clone() for key, value in model.state_dict().items()}
            files = saved(tmp_path, ("deploy", golden_model(CASE, "deploy")))
            assert verify_export(model, files, [batch()]).ok
            assert all(module.training for module in model.modules())
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        finally:
            model.eval()

    def test_may_be_called_through_a_wrapper_with_named_inputs(self, tmp_path: Path) -> None:
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = migrated(CASE)

            def forward(self, images: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
                return {"scores": self.network(images)}

        files = saved(tmp_path, ("deploy", golden_model(CASE, "deploy")))
        assert verify_export(Wrapper(), files, [{"images": batch()[0], "scale": 2.0}]).ok


class TestQdq:
    @pytest.mark.parametrize("case", QDQ_CASES)
    def test_computes_what_the_model_does(self, tmp_path: Path, case: str) -> None:
        """QuantizeLinear divides as training does, so that no code flips where sums are exact."""
        report = verify_export(migrated(case), saved(tmp_path, ("qdq", qdq_model(case))), [batch(case)])
        assert [str(departure) for departure in report.forms[0].departures] == []
        assert all(row.codes and row.outputs for row in report.forms[0].layers)


class TestTies:
    def test_a_top_class_is_a_tie_within_half_a_step_by_the_model_s_own_scores(self) -> None:
        compared = OutputComparison("scores", 0.2)
        wanted = np.array([[1.0, 0.95, 0.0], [1.0, 0.8, 0.0], [0.0, 0.0, 5.0]], np.float32)
        found = np.array([[0.9, 1.0, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 5.0]], np.float32)
        compared.add(found, wanted)
        report = compared.report()
        assert (report.rows, report.same_top, report.ties) == (3, 1, 1)
        assert report.largest == pytest.approx(1.0)

    @pytest.mark.parametrize(("x", "near"), [(0.5, True), (0.5 + 1e-7, True), (0.500002, False), (0.4, False)])
    def test_a_code_may_differ_only_where_rounding_is_a_matter_of_the_last_bits(self, x: float, near: bool) -> None:
        assert bool(near_a_tie(torch.tensor(x), 1.0, 0.0)) is near
        assert bool(near_a_tie(torch.tensor(x * 0.1), float(np.float32(0.1)), 0.0)) is near


class TestErrors:
    def files(self, folder: Path) -> dict[str, Path]:
        return saved(folder, ("deploy", golden_model(CASE, "deploy")))

    def test_of_a_float_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no quantized layers"):
            verify_export(golden_case(CASE).float_model(), self.files(tmp_path), [batch()])

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no file to verify; files maps one or more of deploy, fake_quant, qdq"),
            ({"depoly": "a.onnx"}, r"no form 'depoly', only deploy, fake_quant, qdq\. Did you mean 'deploy'"),
        ],
    )
    def test_of_forms(self, files: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            verify_export(migrated(CASE), files, [batch()])

    def test_of_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no ONNX file '.*gone\.onnx'"):
            verify_export(migrated(CASE), {"qdq": tmp_path / "gone.onnx"}, [batch()])

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "no batch to verify"),
            (torch.ones(8, 3, 8, 8), r"batches is a Tensor; .*\[batch\]"),
            ([torch.ones(2, 3, 8, 8)], r"'in_data\.1' .*\[8, 3, 8, 8\].*given \[2, 3, 8, 8\]"),
            ([(torch.ones(8, 3, 8, 8), torch.ones(8))], r"has 1 input.*batch holds 2.*without labels"),
        ],
    )
    def test_of_batches(self, tmp_path: Path, batches: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            verify_export(migrated(CASE), self.files(tmp_path), batches)

    def test_of_bits_before_any_work(self) -> None:
        with pytest.raises(ValueError, match="deq_bits is 16"):
            verify_export(migrated(CASE), {"deploy": "gone.onnx"}, [batch()], deq_bits=16)

    def test_a_file_of_another_model_is_no_error_but_a_departure(self, tmp_path: Path) -> None:
        files = saved(tmp_path, ("deploy", golden_model("cnn_bn_relu__channel_wise_false_cfg", "deploy")))
        report = verify_export(migrated(CASE), files, [batch()])
        assert report.first_departure.layer == "conv1"

    def test_a_file_of_another_form_is_told(self, tmp_path: Path) -> None:
        files = saved(tmp_path, ("qdq", golden_model(CASE, "fake_quant")))
        with pytest.raises(ValueError, match=r"qdq\.onnx' is of the form fake_quant, not qdq"):
            verify_export(migrated(CASE), files, [batch()])
