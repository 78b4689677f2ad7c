"""The report of a real run shows the numbers of its files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRecord
from amct_lightning.run_report import write_picture, write_report
from tests.run_report.conftest import Page, report


@pytest.fixture(scope="module")
def page(real_run: Path) -> Page:
    return report(real_run)


def checkpoint(run: Path) -> Path:
    return next(run.rglob("last.ckpt"))


def logged(run: Path, name: str) -> list[dict[str, str]]:
    with next(run.rglob(name)).open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_section_is_there(page: Page) -> None:
    shown = ["curves", "ranges", "sqnr", "layers", "scales", "conversion", "record", "files"]
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == shown
    assert "missing" not in page.attributes("class")


def test_facts_of_the_header(real_run: Path, page: Page) -> None:
    rows = logged(real_run, "metrics.csv")
    last_loss = next(float(row["val_loss"]) for row in reversed(rows) if row["val_loss"])
    assert page.facts["quantized layers"] == "2 of 2"
    assert page.facts["training steps"] == "16"
    assert page.facts["phase at the end"] == "frozen"
    assert page.facts["checkpoint"] == "last.ckpt"
    assert page.facts["val_loss"] == f"{last_loss:.4g}"


def test_last_value_of_each_metric_is_in_the_header(real_run: Path, page: Page) -> None:
    rows = logged(real_run, "metrics.csv")
    names = [name for name in rows[0] if name not in ("epoch", "step") and not name.startswith("quant")]
    assert "val_loss" in names
    for name in names:
        last = [float(row[name]) for row in rows if row[name]][-1]
        assert page.facts[name] == f"{last:.4g}"


def test_sqnr_is_that_of_the_first_calibrated_and_of_the_last_interval(real_run: Path, page: Page) -> None:
    rows = logged(real_run, "quant_monitor.csv")
    for shown in page.rows("SQNR in dB"):
        known = [row for row in rows if row["layer"] == shown["layer"] and row["clip_max"]]
        assert rows[0]["clip_max"] == ""  # before the calibration, so not what "before" is about
        for title, column in (("activations", "sqnr_input_db"), ("weights", "sqnr_weight_db")):
            assert float(shown[f"{title}, before"]) == pytest.approx(float(known[0][column]), abs=0.051)
            assert float(shown[f"{title}, after"]) == pytest.approx(float(known[-1][column]), abs=0.051)


def test_state_of_the_layers_in_the_last_interval(real_run: Path, page: Page) -> None:
    rows = logged(real_run, "quant_monitor.csv")
    for shown in page.rows("Each layer in the last interval"):
        last = [row for row in rows if row["layer"] == shown["layer"]][-1]
        for title in ("clip_min", "clip_max", "scale", "offset"):
            assert shown[title] == f"{float(last[title]):.4g}"
        assert shown["clipped above"] == f"{100 * float(last['saturation_high']):.3g} %"
        assert shown["levels in use"] == f"{100 * float(last['utilisation']):.3g} %"


def test_weight_scales_are_those_of_the_checkpoint(real_run: Path, page: Page) -> None:
    state = torch.load(checkpoint(real_run), weights_only=True)["state_dict"]
    for shown in page.rows("Weight scales"):
        scale = state[f"{shown['layer']}.weight_quantizer.scale"]
        assert shown["scales"] == str(scale.numel())
        assert shown["smallest"] == f"{scale.min().item():.4g}"
        assert shown["largest"] == f"{scale.max().item():.4g}"


def test_record_table_is_exact(real_run: Path, page: Page) -> None:
    record = QuantRecord.load(checkpoint(real_run).with_name("last.record.txt"))
    shown = page.rows("The record")
    assert [row["layer"] for row in shown] == list(record)
    for row in shown:
        layer = record[row["layer"]]
        assert torch.tensor(float(row["scale_d"])).item() == layer.scale_d
        assert torch.tensor(float(row["smallest scale_w"])).item() == min(layer.scale_w)
        assert (row["offset_d"], row["scale_w"]) == (str(layer.offset_d), str(len(layer.scale_w)))


def test_conversion_table(page: Page) -> None:
    assert page.tables["What the conversion did to each layer"][1:] == [
        ["net.0", "Conv2d", "A8W8", "arq_retrain, per channel", "net.1", ""],
        ["net.4", "Linear", "A8W8", "arq_retrain, per tensor", "", "input never negative"],
    ]


def test_pictures_have_descriptions_and_name_the_phases(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 5
    assert all(attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20 for attributes in pictures)
    curves = page.sections["curves"]
    assert all(word in curves for word in ("float", "learning", "frozen", "train", "val_loss"))


def test_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    for name in ("src", "href"):
        assert all(value.startswith(("#", "data:image/png")) for value in page.attributes(name))
    assert "url(http" not in page.html
    assert "default-src 'none'" in page.html


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.attributes("href") if link.startswith("#")} <= set(ids)


def test_same_bytes_in_another_process(real_run: Path, tmp_path: Path) -> None:
    here = write_report(real_run, tmp_path / "here.html")
    code = "import sys; from amct_lightning.run_report import write_report; write_report(sys.argv[1], sys.argv[2])"
    there = tmp_path / "there.html"
    subprocess.run(
        [sys.executable, "-c", code, str(real_run), str(there)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123", "TZ": "Asia/Shanghai", "LANG": "C"},
    )
    assert here.read_bytes() == there.read_bytes()


def test_checkpoint_alone_shows_what_it_holds(real_run: Path) -> None:
    path = checkpoint(real_run)
    page = Page(write_report(path, real_run.parent / "checkpoint.html").read_text())
    assert {"Weight scales", "The record", "What the conversion did to each layer"} == set(page.tables)
    assert "report the folder of the run" in page.sections["curves"]
    assert page.facts["quantized layers"] == "2 of 2"


def test_picture_is_written(real_run: Path, tmp_path: Path) -> None:
    first, second = (write_picture(real_run, tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
