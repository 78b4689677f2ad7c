"""Inputs that are damaged, hostile or nearly empty."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import amct_lightning.run_report
from amct_lightning.checkpoint_file import CHECKPOINT_KEY
from amct_lightning.cli import main
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.run_report import write_picture, write_report
from amct_lightning.run_report.sources import load_run
from tests.run_report.conftest import report, write_metrics, write_monitor

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, about what cannot be drawn

HOSTILE = [
    "<script>alert(1)</script>",
    'a" onload="x',
    "头部.分类器",
    "$x_{1}$ & \\frac",
    "a\x00\x1b\ud7ff\n",
    "url(#p)",
]


def monitor_row(step: int, layer: str, **values: float) -> dict[str, object]:
    ends = {"clip_max": 1.0 + step, "clip_min": -1.0, "sqnr_input_db": 30.0, "sqnr_weight_db": 40.0}
    return {"step": step, "epoch": 0, "layer": layer, **ends, **values}


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    write_metrics(run, range(9, 100, 10), **{f"val_{name}": 0.5 for name in HOSTILE[:4]})
    write_monitor(run, [monitor_row(step, name) for step in (10, 20) for name in HOSTILE])
    page = report(run)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not page.attributes("onload")
    assert all(text.isprintable() for text in page.attributes("aria-label"))
    shown = [row["layer"] for row in page.rows("SQNR in dB")]
    assert shown[:4] == HOSTILE[:4]
    assert "<script>alert(1)</script>" in page.sections["ranges"]  # as text, in the picture


def test_many_layers_with_long_names(tmp_path: Path) -> None:
    names = [f"model.encoder.layers.{n}.attention.self.query_projection" for n in range(150)]
    write_monitor(tmp_path / "run", [monitor_row(s, name) for s in (10, 20, 30) for name in names])
    page = report(tmp_path / "run")
    assert [row["layer"] for row in page.rows("Each layer")] == names
    assert "60 layers with the lowest values" in page.sections["sqnr"]
    assert "12 of 150 layers" in page.sections["ranges"]
    assert len(page.html) < 2_000_000


def test_many_metrics_with_long_names(tmp_path: Path) -> None:
    names = [f"val_loss_of_the_{n}th_domain/dataloader_idx_{n}" for n in range(12)] + [f"extra_{n}" for n in range(12)]
    write_metrics(tmp_path / "run", [9, 19], **dict.fromkeys(names, 0.5))
    page = report(tmp_path / "run")
    assert [name for name in page.facts if name in names] == names[:8]
    assert "4 of 24 metrics; a logger shows all of them." in page.sections["curves"]


@pytest.mark.parametrize("values", [[math.nan, math.inf, -math.inf], [0.5, math.nan, 0.25], [1e300, -1e300, 0.0]])
def test_values_that_are_not_finite_are_told(tmp_path: Path, values: list[float]) -> None:
    write_metrics(tmp_path / "run", [9, 19, 29], train_loss=dict(zip([9, 19, 29], values, strict=True)).__getitem__)
    rows = [monitor_row(10 * place, "fc", clip_max=v, sqnr_input_db=v) for place, v in enumerate(values)]
    write_monitor(tmp_path / "run", rows)
    page = report(tmp_path / "run")
    bad = [9 + 10 * place for place, value in enumerate(values) if not math.isfinite(value)]
    said = f"train_loss: {len(bad)} of 3 values are NaN or infinite, the first at step {bad[0]}." if bad else ""
    assert said in page.sections["curves"]
    assert ("NaN or infinite" in page.sections["curves"]) is bool(bad)


def test_a_single_point_is_enough(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [0], val_acc=0.5, quant_phase=2)
    write_monitor(tmp_path / "run", [monitor_row(0, "fc")])
    page = report(tmp_path / "run")
    assert page.facts["val_acc"] == "0.5"
    assert page.facts["phase at the end"] == "learning"
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_only_the_end_of_a_long_training_is_left(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", range(90_000, 90_100, 10), val_loss=0.5, quant_phase=3)
    page = report(tmp_path / "run")
    assert "frozen" in page.sections["curves"]
    assert "90,0" in page.sections["curves"]  # the ticks of the axis begin there, not at 0


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    whole = write_metrics(tmp_path, range(9, 100, 10), loss=lambda step: 1 / (step + 1)).read_text()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0]), len(whole)):
        (tmp_path / "metrics.csv").write_text(whole[:cut])
        complete = whole[:cut].count("\n") - 1
        run = load_run(tmp_path) if complete else None
        assert run is None or len(run.metrics["loss"]) == complete
        assert run is None or any("incomplete" in note for note in run.notes) is (whole[cut - 1] != "\n")


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\x00" * 50, b"\xff\xfe\x00garbage", b"epoch,step\n0,\n", b"a" * 200_000 + b"\n1\n"]
)
def test_a_file_without_content_is_as_none(tmp_path: Path, content: bytes) -> None:
    for name in ("metrics.csv", "quant_monitor.csv"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match="holds nothing to report"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_lines_without_a_step_are_counted(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, range(9, 100, 10), loss=0.5)
    path.write_text(path.read_text() + "0,,0.5\n0,nonsense,1\n0,-5,1\n0,1e300,1\n0,109,0.25,too,many\n")
    run = load_run(tmp_path)
    assert run.metrics["loss"][109] == 0.25
    assert run.notes == ["metrics.csv: 4 lines without a step left out."]


def test_checkpoint_that_is_damaged(real_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(next(real_run.rglob("last.ckpt")).read_bytes()[:5000])
    with pytest.raises(RuntimeError, match=r"last\.ckpt' cannot be read as a checkpoint"):
        write_report(path, tmp_path / "report.html")


def test_checkpoint_without_quantization(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match="written without QuantRetrainCallback"):
        write_report(tmp_path / "float.ckpt", tmp_path / "report.html")


@pytest.mark.parametrize("plan", [None, [], {}, {"config": 3, "layers": [], "search_n": False}, "text"])
def test_checkpoint_with_a_damaged_plan(tmp_path: Path, plan: object) -> None:
    torch.save({"state_dict": {}, CHECKPOINT_KEY: {"plan": plan}}, tmp_path / "bad.ckpt")
    with pytest.raises((ValueError, TypeError), match=r"bad\.ckpt"):
        write_report(tmp_path / "bad.ckpt", tmp_path / "report.html")


def test_what_a_network_computes_in_float_beside_its_layers_is_told(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    plan = make_plan(encoder, None, torch.randn(2, 3, 8)).to_dict()
    torch.save({"state_dict": {}, CHECKPOINT_KEY: {"plan": plan}}, tmp_path / "last.ckpt")
    said = report(tmp_path / "last.ckpt").sections["conversion"]
    assert "In float beside these layers: 4 LayerNorm, 2 matmul, 2 scaled_dot_product_attention." in said


def test_scales_that_no_record_can_hold_are_named(real_run: Path, tmp_path: Path) -> None:
    content = torch.load(next(real_run.rglob("last.ckpt")), weights_only=True)
    content["state_dict"]["net.0.weight_quantizer.scale"][:2] = torch.tensor([-1.0, math.nan])
    content["state_dict"]["net.4.weight_quantizer.scale"].fill_(0.0)
    content[CHECKPOINT_KEY]["record"] = None
    torch.save(content, tmp_path / "bad.ckpt")
    page = report(tmp_path / "bad.ckpt")
    assert "no record can hold: net.0, net.4." in page.sections["scales"]
    assert [row["not usable"] for row in page.rows("Weight scales")] == ["2", "1"]
    assert "There is no record yet" in page.sections["record"]


def test_sharded_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(IsADirectoryError, match="consolidate_checkpoint"):
        write_report(tmp_path / "last.ckpt", tmp_path / "report.html")


def test_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        write_report(tmp_path / "nothing", tmp_path / "report.html")


@pytest.mark.parametrize(("write", "name"), [(write_report, "report.png"), (write_picture, "report.html")])
def test_output_of_another_kind_is_refused(tmp_path: Path, write: object, name: str) -> None:
    write_metrics(tmp_path, [9], loss=0.5)
    with pytest.raises(ValueError, match="must end in"):
        write(tmp_path, tmp_path / name)  # type: ignore[operator]


def test_a_picture_of_nothing_leaves_the_old_one(tmp_path: Path) -> None:
    write_monitor(tmp_path, [{"step": 10, "epoch": 0, "layer": "fc", "clip_max": 1}])
    (tmp_path / "old.png").write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match="nothing to draw"):
        write_picture(tmp_path, tmp_path / "old.png")
    assert [path.name for path in tmp_path.iterdir() if "png" in path.name] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_is_missing_is_named_and_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    write_metrics(tmp_path, [9], loss=0.5)
    monkeypatch.setitem(sys.modules, missing, None)
    for write, name in ((write_report, "report.html"), (write_picture, "report.png")):
        with pytest.raises(ImportError, match=rf"needs {missing}.*pip install 'amct-lightning\[report\]'"):
            write(tmp_path, tmp_path / name)


def test_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path, [9], loss=0.5)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 2
    assert "needs jinja2" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_package_can_be_imported_without_what_the_report_needs() -> None:
    # torchmetrics imports matplotlib, and torch jinja2, where they are installed; the package itself must not.
    code = "import sys, amct_lightning.cli, amct_lightning.run_report; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    ours = [importlib.import_module(name) for name in found if name.startswith("amct_lightning")]
    assert amct_lightning.run_report in ours
    assert not [m.__name__ for m in ours if re.search("^(import|from) (matplotlib|jinja2)", inspect.getsource(m), re.M)]


def test_settings_of_the_user_do_not_matter_and_stay(tmp_path: Path) -> None:
    import matplotlib

    write_metrics(tmp_path, [9, 19], val_acc=0.5)
    first = write_report(tmp_path, tmp_path / "a.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert write_report(tmp_path, tmp_path / "b.html").read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_the_package_needs_neither_lightning_nor_the_callbacks() -> None:
    folder = Path(amct_lightning.run_report.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("lightning", "amct_lightning.callbacks")) for name in names), path
