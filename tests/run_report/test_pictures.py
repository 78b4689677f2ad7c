"""The pictures of a page: nothing that is written in them is cut off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.textpath import TextPath

from tests.run_report.conftest import report, write_metrics, write_monitor


def pictures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def ends_of_texts(picture: ElementTree.Element) -> Iterator[tuple[str, float, float, float, float]]:
    """Each text with the coordinates of its two ends on its baseline; texts stand upright or lie flat."""
    for element in picture.iter("text"):
        text, style = element.text or "", element.get("style", "")
        [anchor], [size] = re.findall(r"text-anchor: (\w+)", style), re.findall(r"font-size: ([\d.]+)px", style)
        x, y = float(element.get("x", "nan")), float(element.get("y", "nan"))
        length = TextPath((0, 0), text, size=float(size)).get_extents().width
        before = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * length
        if re.match(r"rotate\(-?90 ", element.get("transform", "")):
            yield text, x, y + before, x, y + before - length
        else:
            yield text, x - before, y, x - before + length, y


@pytest.mark.parametrize("layers", [1, 2, 4, 30])
def test_no_text_is_cut_however_few_layers_there_are(tmp_path: Path, layers: int) -> None:
    steps, run = (10, 20, 30, 60), tmp_path / "run"
    values = {"epoch": 0, "clip_min": -1.0, "sqnr_input_db": 30.0, "sqnr_weight_db": 40.0}
    write_metrics(run, range(0, 100, 10), train_loss=lambda step: 1 / (1 + step), val_acc=0.5)
    write_monitor(
        run,
        [
            {"step": step, "layer": f"net.{place}.conv", "clip_max": 1.0 + step * (place + 1) / 50, **values}
            for step in steps
            for place in range(layers)
        ],
    )
    drawn = pictures(report(run).html)
    assert len(drawn) == 4
    written = {text for picture in drawn for text, *_ in ends_of_texts(picture)}
    assert {"train_loss", "width relative to the first one", "SQNR in dB"} <= written
    for picture in drawn:
        width, height = map(float, picture.get("viewBox", "").split()[2:])
        for text, *ends in ends_of_texts(picture):
            assert all(-1 <= x <= width + 1 for x in ends[::2]), text
            assert all(-1 <= y <= height + 1 for y in ends[1::2]), text


def test_the_ticks_of_the_colour_bar_do_not_cover_each_other(tmp_path: Path) -> None:
    write_monitor(
        tmp_path / "run",
        [{"step": step, "epoch": 0, "layer": "fc", "clip_max": float(step), "clip_min": 0.0} for step in (10, 20)],
    )
    [bar] = [
        sorted(y for text, _, y, *_ in ends_of_texts(picture) if text.startswith("×"))
        for picture in pictures(report(tmp_path / "run").html)
        if "width relative to the first one" in {text for text, *_ in ends_of_texts(picture)}
    ]
    assert len(bar) >= 3
    assert min(lower - upper for upper, lower in pairwise(bar)) > 8.5  # the size of the letters
