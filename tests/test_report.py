"""What the report says of a conversion, how it looks, and where it is logged."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import pytest
import torch
from lightning_utilities.core import rank_zero
from rich.console import Console
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRetrainCallback, conversion_report, prepare_qat
from amct_lightning.conversion.convert import convert_layers, revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.conversion.report import ConversionReport
from amct_lightning.conversion.report_rows import ReportRow
from tests.callbacks.conftest import Net as LightningNet
from tests.callbacks.conftest import loader


class MyConv2d(nn.Conv2d):
    """A subclass that does nothing."""


class Net(nn.Module):
    """Something of everything that a report can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.stem = nn.Conv2d(2, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.mine = MyConv2d(32, 32, 1)
        self.block = nn.ModuleDict({"left": nn.Conv2d(32, 32, 1), "right": nn.Conv2d(32, 32, 1, groups=32)})
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.mine(self.block["left"](x) + self.block["right"](x)).mean((2, 3))
        return self.head(self.twice(self.twice(x)))


def image() -> Tensor:
    return torch.randn(2, 2, 6, 6)


def report_of(config: Any = None, **options: Any) -> ConversionReport:
    return conversion_report(prepare_qat(Net(), config, image(), **options))


def rows_of(config: Any = None, **options: Any) -> dict[str, ReportRow]:
    return {row.name: row for row in report_of(config, **options).rows}


class TestRows:
    """One row per layer of a supported type."""

    def test_they_are_in_module_order_whatever_became_of_the_layer(self) -> None:
        assert list(rows_of({"skip_layers": ["stem"]})) == [
            *("unused", "stem", "mine", "block.left", "block.right", "twice", "head")
        ]

    def test_a_quantized_layer_shows_its_settings(self) -> None:
        weights = {"algo": "ulq_retrain", "channel_wise": False}
        row = rows_of({"layers": {"stem": {"activations": {"dst_type": "INT16"}, "weights": weights}}})["stem"]
        assert (row.type, row.bits, row.weight_algo, row.channel_wise) == ("Conv2d", "A16W8", "ulq_retrain", False)
        assert (row.quantized, row.reason, row.batch_norm, row.fixed_min) == (True, None, "bn", False)

    def test_layers_that_share_a_quantizer_name_each_other(self) -> None:
        rows = rows_of()
        assert rows["block.left"].shares_with == ("block.right",)
        assert rows["block.right"].shares_with == ("block.left",)
        assert rows["block.left"].fixed_min

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("unused", "never called with the given input_data"),
            ("mine", "is a MyConv2d, a subclass of Conv2d; only the exact class is quantized, as in AMCT"),
            ("twice", "called 2 times; quantized only with allow_reuse=True"),
            ("head", "disabled in the config"),
        ],
    )
    def test_a_layer_in_float_says_why(self, name: str, reason: str) -> None:
        row = rows_of({"skip_layers": ["head"]})[name]
        assert (row.quantized, row.reason, row.bits) == (False, reason, "")

    def test_a_reused_layer_shows_its_calls(self) -> None:
        assert rows_of(allow_reuse=True)["twice"].calls == 2

    @pytest.mark.parametrize(
        "find",
        [lambda m: nn.Sequential(m), copy.deepcopy, lambda m: m.train()],  # noqa: PLW0108  (a wrapper, not a copy)
        ids=["wrapper", "deepcopy", "training"],
    )
    def test_names_are_those_of_the_record_from_wherever_it_is_asked(self, find: Callable[[nn.Module], Any]) -> None:
        model = prepare_qat(Net(), None, image())
        assert conversion_report(find(model)) == conversion_report(model)

    def test_a_plan_from_a_checkpoint_gives_the_same_report(self) -> None:
        model = prepare_qat(Net(), None, image())
        before, found = conversion_report(model), find_plan(model)
        assert found is not None
        revert_layers(model)
        convert_layers(model, QuantPlan.from_dict(found[1].to_dict()))
        assert conversion_report(model) == before

    def test_a_float_model_is_refused_with_a_remedy(self) -> None:
        with pytest.raises(ValueError, match=r"Net is not converted.*prepare_qat\("):
            conversion_report(Net())


class TestFloatParts:
    """What has no row and stays in float is told in one line."""

    @staticmethod
    def transformer() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        )

    def report(self) -> ConversionReport:
        return conversion_report(prepare_qat(self.transformer(), None, torch.randn(2, 3, 8)))

    def test_below_the_count_of_the_layers(self) -> None:
        first, second, third, *_ = str(self.report()).splitlines()
        assert first.startswith("5 of 7 layers are quantized")
        assert second == "In float beside these layers: 4 LayerNorm, 2 matmul, 2 scaled_dot_product_attention."
        assert third == ""

    def test_a_network_without_any_has_no_such_line(self) -> None:
        assert "beside" not in str(report_of())

    def test_a_plan_from_a_checkpoint_tells_it_as_well(self) -> None:
        model = prepare_qat(self.transformer(), None, torch.randn(2, 3, 8))
        found = find_plan(model)
        assert found is not None
        again = self.transformer()
        convert_layers(again, QuantPlan.from_dict(found[1].to_dict()))
        assert conversion_report(again).float_parts == conversion_report(model).float_parts


class TestWarnings:
    """What often costs accuracy or speed, a line per kind."""

    def warning(self, word: str, config: Any = None) -> str:
        return next((text for text in report_of(config).warnings if word in text), "")

    def test_few_input_channels(self) -> None:
        text = self.warning("fewer than 17 input channels: often loses more accuracy than it saves time")
        assert text.endswith(": 'stem'")

    def test_layers_in_float_are_not_warned_of(self) -> None:
        assert not self.warning("fewer than 17", {"skip_layers": ["stem"]})

    @pytest.mark.parametrize(
        ("skipped", "named"), [([], "'stem', 'head'"), (["stem"], "'head'"), (["stem", "head"], "")]
    )
    def test_the_first_and_the_last_layer_to_run(self, skipped: list[str], named: str) -> None:
        text = self.warning("first or last layer", {"skip_layers": skipped})
        assert text.endswith(f": {named}") if named else not text

    @pytest.mark.parametrize(("channel_wise", "warned"), [(True, False), (False, True)])
    def test_a_depthwise_layer_with_one_scale(self, channel_wise: bool, warned: bool) -> None:
        text = self.warning("depthwise", {"weights": {"channel_wise": channel_wise}})
        assert text.endswith(": 'block.right'") if warned else not text

    def test_layers_that_the_example_did_not_reach(self) -> None:
        assert self.warning("never reached by input_data").endswith(": 'unused'")

    def test_more_than_eight_names_are_abbreviated(self) -> None:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)))
        report = conversion_report(prepare_qat(model, None, torch.randn(2, 4)))
        assert report.warnings[0].endswith("'6', '7' and 3 more")


class Deep(nn.Module):
    """Layers with long names, one of which could be taken for rich's markup."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"[bold]attention_self": nn.ModuleDict({"query_projection": nn.Linear(32, 32)})})
        self.encoder["intermediate_transformation"] = nn.ModuleDict({"dense": nn.Linear(32, 32)})

    def forward(self, x: Tensor) -> Tensor:
        inner = self.encoder["[bold]attention_self"]["query_projection"]
        return self.encoder["intermediate_transformation"]["dense"](torch.relu(inner(x)))


class TestText:
    """How it looks."""

    @pytest.fixture
    def report(self) -> ConversionReport:
        return conversion_report(prepare_qat(Deep(), None, torch.randn(2, 32)))

    @pytest.mark.parametrize("columns", [60, 80, 120])
    @pytest.mark.parametrize(
        "make", [report_of, lambda: conversion_report(prepare_qat(Deep(), None, torch.randn(2, 32)))]
    )
    def test_it_fits_the_terminal_and_is_plain_ascii(
        self, monkeypatch: pytest.MonkeyPatch, columns: int, make: Callable[[], ConversionReport]
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        text = str(make())
        assert text.isascii()
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= columns
        assert all(line == line.rstrip() for line in text.splitlines())

    def test_a_wide_terminal_shows_a_row_per_line(
        self, monkeypatch: pytest.MonkeyPatch, report: ConversionReport
    ) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        lines = str(report).splitlines()
        assert lines[0].startswith("2 of 2 layers are quantized (A8W8: bits of activations and weights")
        assert "encoder.[bold]attention_self.query_projection  Linear  A8W8 ARQ" in lines
        assert "encoder.intermediate_transformation.dense      Linear  A8W8 ARQ   input >= 0" in lines

    def test_a_narrow_terminal_breaks_names_at_their_dots(
        self, monkeypatch: pytest.MonkeyPatch, report: ConversionReport
    ) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        lines = [line.split("  ")[0] for line in str(report).splitlines()]
        assert lines[lines.index("encoder.[bold]attention_self") + 1] == " .query_projection"

    def test_every_layer_has_its_notes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "120")
        text = str(report_of(allow_reuse=True))
        assert "stem         Conv2d  A8W8 ARQ/ch  folds bn" in text
        assert "block.left   Conv2d  A8W8 ARQ/ch  input >= 0; shares input with .right" in text
        assert "twice        Linear  A8W8 ARQ     called 2 times" in text
        assert "unused       Linear  float        never called with the given input_data" in text
        assert "\nNote: fewer than 17 input channels" in text

    def test_rich_shows_it_in_colours(self, report: ConversionReport) -> None:
        console = Console(force_terminal=True, width=100, color_system="standard")
        with console.capture() as capture:
            console.print(report)
        assert "\x1b[1mLayer" in capture.get()


class TestLog:
    """It is logged once, when the model is converted."""

    def test_by_create_quant_retrain_model(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config, record = str(tmp_path / "config.json"), str(tmp_path / "record.txt")
        amct.create_quant_retrain_config(config, Net(), image())
        with caplog.at_level(logging.INFO, logger="amct_lightning"):
            amct.create_quant_retrain_model(config, Net(), record, image())
        (message,) = [r.getMessage() for r in caplog.records if "layers are quantized" in r.getMessage()]
        assert message.startswith(f"The record goes to '{record}'. 4 of 7 layers are quantized")
        assert "\nstem " in message

    def test_by_the_callback_in_the_first_setup_only(self, tmp_path: Path) -> None:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        rank_zero.log.addHandler(handler)
        try:
            model = LightningNet()
            for _ in range(2):
                trainer = pl.Trainer(
                    max_steps=1,
                    accelerator="cpu",
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    default_root_dir=tmp_path,
                    callbacks=[QuantRetrainCallback()],
                )
                trainer.fit(model, loader())
        finally:
            rank_zero.log.removeHandler(handler)
        (message,) = [text for text in messages if "layers are quantized" in text]
        assert message.startswith(
            f"QuantRetrainCallback: the record goes to '{tmp_path / 'record.txt'}'. 2 of 2 layers"
        )


def test_at_a_prompt_and_in_a_notebook_it_shows_the_table() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<img src=x>", nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("<img src=x>")(x)

    report = conversion_report(prepare_qat(Named(), None, torch.ones(1, 4)))
    assert repr(report) == str(report)
    page = ElementTree.fromstring(f"<body>{report._repr_html_()}</body>")
    head, table, *notes = page
    assert (head.text or "").startswith("1 of 1 layers are quantized (A8W8: ")
    assert [note.text for note in notes] == [f"Note: {warning}." for warning in report.warnings] != []
    cells = [[cell.text or "" for cell in row] for row in table.iter("tr")]
    assert cells == [["Layer", "Type", "Quantized", "Notes"], ["<img src=x>", "Linear", "A8W8 ARQ", ""]]
