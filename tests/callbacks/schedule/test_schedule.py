"""The schedule itself: a pure function of the position, its fields, its table."""

from __future__ import annotations

import re
from collections import UserDict, UserList
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amct_lightning import QuantSchedule
from amct_lightning.callbacks.schedule.checks import check_contradictions, check_patterns
from amct_lightning.callbacks.schedule.schedule import Part, Position, to_epoch
from amct_lightning.callbacks.schedule.table import schedule_table


def at(epoch: int, **kwargs: Any) -> Position:
    return Position(epoch, **{"max_epochs": 10, **kwargs})


def test_mappings_and_lists_of_any_class_mean_what_dicts_and_lists_do() -> None:
    layers = UserDict({"a.*": UserDict({"calibrate": UserList([2, 4])})})
    schedule = QuantSchedule.of(UserDict({"calibrate": UserList([0, 3]), "layers": layers}))
    assert schedule == QuantSchedule(calibrate=[0, 3], layers={"a.*": {"calibrate": [2, 4]}})
    assert (schedule.for_layer("a.0").calibration_epochs(10), schedule.calibration_epochs(10)) == ([2, 4], [0, 3])


class TestEpochs:
    @pytest.mark.parametrize(
        ("moment", "max_epochs", "epoch"),
        [(1, 10, 1), (1.0, 10, 10), (0.0, 10, 0), (0.7, 10, 7), (0.25, 10, 3), (0.1, 3, 1), (7, None, 7)],
    )
    def test_an_int_is_an_epoch_and_a_float_a_share(self, moment: Any, max_epochs: Any, epoch: int) -> None:
        assert to_epoch(moment, max_epochs, "start") == epoch

    @given(st.integers(1, 1000), st.integers(0, 1000))
    def test_a_share_that_is_a_whole_epoch_is_that_epoch(self, max_epochs: int, epoch: int) -> None:
        if epoch <= max_epochs:
            assert to_epoch(epoch / max_epochs, max_epochs, "start") == epoch

    def test_a_share_of_a_training_without_end_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"freeze_data=0\.5.*needs max_epochs"):
            QuantSchedule(freeze_data=0.5).phase("a", at(0, max_epochs=None))


class TestPhase:
    def test_the_default_calibrates_at_once_and_freezes_nothing(self) -> None:
        for epoch in range(10):
            phase = QuantSchedule().phase("a", at(epoch))
            assert phase.quantized and phase.calibrates and phase.updates
            assert not (phase.recalibrates or phase.data_frozen or phase.weights_frozen or phase.bn_frozen)

    def test_start_follows_the_calibration_and_the_calibration_the_start(self) -> None:
        assert [QuantSchedule(calibrate=2).phase("a", at(e)).quantized for e in (1, 2)] == [False, True]
        assert [QuantSchedule(start=2).phase("a", at(e)).calibrates for e in (1, 2)] == [False, True]

    def test_calibration_before_the_start(self) -> None:
        schedule = QuantSchedule(calibrate=1, start=3)
        assert [schedule.phase("a", at(e)).calibrates for e in range(4)] == [False, True, True, True]
        assert [schedule.phase("a", at(e)).quantized for e in range(4)] == [False, False, False, True]

    def test_only_the_first_batch_of_a_later_calibration_begins_anew(self) -> None:
        schedule = QuantSchedule(calibrate=[4, 0, 0.6])
        begins = [(e, b) for e in range(10) for b in range(3) if schedule.phase("a", at(e, batch=b)).recalibrates]
        assert begins == [(4, 0), (6, 0)]

    def test_each_part_freezes_at_its_epoch(self) -> None:
        schedule = QuantSchedule(freeze_data=2, freeze_weights=0.5, freeze_bn=7)
        frozen = [
            tuple(schedule.should_freeze(part, "a", at(e)) for part in ("data", "weights", "bn")) for e in (1, 2, 5, 7)
        ]
        assert frozen == [(False,) * 3, (True, False, False), (True, True, False), (True,) * 3]

    def test_updates_every_n_steps_and_epochs(self) -> None:
        schedule = QuantSchedule(start=1, update_every_n_steps=3, update_every_n_epochs=2)
        updates = [(e, s) for e in (1, 2, 3) for s in range(7) if schedule.phase("a", at(e, step=s)).updates]
        assert updates == [(e, s) for e in (1, 3) for s in (0, 3, 6)]

    def test_the_last_pattern_that_fits_counts(self) -> None:
        schedule = QuantSchedule(
            freeze_data=1, layers={"*": {"freeze_data": 5}, "a.*": {"freeze_data": None}, "a.0": {"freeze_bn": 0}}
        )
        assert schedule.for_layer("b").freeze_data == 5
        assert schedule.for_layer("a.1").freeze_data is None
        assert (schedule.for_layer("a.0").freeze_data, schedule.for_layer("a.0").freeze_bn) == (1, 0)

    def test_the_name_of_a_layer_is_no_pattern(self) -> None:
        names, schedule = ["conv[1]", "conv1"], QuantSchedule(layers={"conv[1]": {"freeze_data": 0}})
        check_patterns(schedule, names)
        assert schedule.phase("conv[1]", at(0)).data_frozen
        assert [schedule.with_names(names).phase(name, at(0)).data_frozen for name in names] == [True, False]
        rows = [row for row in schedule_table(schedule, names, 1).splitlines() if row.startswith("0")]
        assert [row.split()[1] for row in rows] == ["'conv[1]'", "'conv1'"]

    def test_rules_of_ones_own(self) -> None:
        class Odd(QuantSchedule):
            def should_freeze(self, part: Part, layer: str, at: Position) -> bool:
                return layer == "a" and at.epoch % 2 == 1

        assert [Odd().phase("a", at(e)).data_frozen for e in range(3)] == [False, True, False]
        assert not Odd().phase("b", at(1)).data_frozen


class Mine(QuantSchedule):
    """A schedule for a YAML file to name."""


class TestClassPath:
    def test_a_subclass_of_ones_own(self) -> None:
        schedule = QuantSchedule.of({"class_path": f"{__name__}.Mine", "init_args": {"freeze_bn": 3}})
        assert type(schedule) is Mine and schedule.freeze_bn == 3
        assert type(QuantSchedule.of({"class_path": f"{__name__}.Mine"})) is Mine

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"class_path": "no.such.Thing"}, r"'no\.such\.Thing' cannot be imported"),
            ({"class_path": "math.nothing"}, r"'math\.nothing' cannot be imported"),
            ({"class_path": "Thing"}, r"'Thing' cannot be imported"),
            ({"class_path": "pathlib.Path"}, r"'pathlib\.Path' is no subclass"),
            ({"class_path": f"{__name__}.Mine", "freeze_bn": 3}, r"no field 'freeze_bn'"),
            ({"class_path": f"{__name__}.Mine", "init_args": {"freeze": 3}}, r"no field 'freeze'"),
        ],
    )
    def test_wrong_ones_are_told(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            QuantSchedule.of(values)


class TestFields:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"start": "2"}, r"start='2'.*epoch as an integer, or a share"),
            ({"start": True}, r"start=True"),
            ({"start": -1}, r"start=-1.*counted from 0"),
            ({"freeze_bn": 1.5}, r"freeze_bn=1\.5.*must be in \[0, 1\]; give epochs as integers"),
            ({"freeze_bn": float("nan")}, r"freeze_bn=nan"),
            ({"calibrate": []}, r"calibrate=\[\].*at least one"),
            ({"calibrate": [1, None]}, r"calibrate=\[1, None\]"),
            ({"calibrate_batches": 0}, r"calibrate_batches=0.*1 or more"),
            ({"calibrate_batches": 1.0}, r"calibrate_batches=1\.0.*integer"),
            ({"update_every_n_steps": 0}, r"update_every_n_steps=0.*1 or more"),
            ({"update_every_n_epochs": None}, r"update_every_n_epochs=None.*integer"),
            ({"layers": ["a"]}, r"layers=\['a'\].*mapping"),
            ({"layers": {"a": 3}}, r"layers\['a'\] = 3.*mapping of fields"),
            ({"layers": {"a": {"freeze": 3}}}, r"layers\['a'\]: there is no field 'freeze'\. Did you mean 'freeze_"),
            ({"layers": {"a": {"calibrate_batches": 3}}}, r"no field 'calibrate_batches'"),
            ({"layers": {"a": {"freeze_bn": "x"}}}, r"layers\['a'\]\(freeze_bn='x'\)"),
            ({"freeze_dat": 3}, r"no field 'freeze_dat'\. Did you mean 'freeze_data'"),
        ],
    )
    def test_wrong_ones_are_told(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            QuantSchedule.of(values)

    def test_something_else_than_a_schedule_is_told(self) -> None:
        with pytest.raises(TypeError, match=r"schedule must be a QuantSchedule, a mapping.*'cosine'"):
            QuantSchedule.of("cosine")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            (QuantSchedule(start=1, calibrate=3), r"start=1 is epoch 1, but calibrate=3 is epoch 3"),
            (QuantSchedule(calibrate=[0, 0.8], freeze_data=5), r"freeze_data=5 is epoch 5.*in epoch 8"),
            (
                QuantSchedule(layers={"a": {"freeze_data": 0}}, calibrate=1),
                r"layers\['a'\].*after the last calibration",
            ),
        ],
    )
    def test_contradictions_are_told(self, schedule: QuantSchedule, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_contradictions(schedule, 10)

    def test_a_pattern_for_no_layer_is_told(self) -> None:
        with pytest.raises(ValueError, match=r"'net\.5' fits no quantized layer.*'net\.4'"):
            check_patterns(QuantSchedule(layers={"net.5": {}}), ["net.0", "net.4"])

    def test_all_fields_but_the_global_ones_can_be_set_for_some_layers(self) -> None:
        names = {field.name for field in fields(QuantSchedule)} - {"layers", "calibrate_batches", "restart_scores"}
        schedule = QuantSchedule(layers={"a": dict.fromkeys(names, 3)})
        assert {name: getattr(schedule.for_layer("a"), name) for name in names} == dict.fromkeys(names, 3)
        assert schedule.for_layer("b") == QuantSchedule(layers=schedule.layers)


class TestTable:
    @pytest.fixture(autouse=True)
    def wide_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "160")  # no cell is broken over two lines

    def test_what_changes_when(self) -> None:
        schedule = QuantSchedule(
            start=2, calibrate=[1, 5], freeze_data=6, freeze_bn=0.5, layers={"c": {"freeze_weights": 0}}
        )
        table = schedule_table(schedule, ["a", "b", "c"], 8)
        assert [re.sub(" +", " ", line) for line in table.splitlines()[2:]] == [
            "0 all no - - updated",
            "1 all no calibrated, then kept - updated",
            "2 - 3 'a', 'b' yes updated updated updated",
            "2 - 3 'c' yes updated frozen updated",
            "4 'a', 'b' yes updated updated frozen",
            "4 'c' yes updated frozen frozen",
            "5 'a', 'b' yes calibrated, then updated updated frozen",
            "5 'c' yes calibrated, then updated frozen frozen",
            "6 - 7 'a', 'b' yes frozen updated frozen",
            "6 - 7 'c' yes frozen frozen frozen",
        ]

    def test_a_training_without_end(self) -> None:
        last = schedule_table(QuantSchedule(freeze_bn=3, update_every_n_steps=4), ["a"], None).splitlines()[-1]
        assert last.split()[:3] == ["3", "-", "all"]
        assert "updated every 4 steps" in last

    def test_rules_of_ones_own_are_asked(self) -> None:
        class Own(QuantSchedule):
            def should_freeze(self, part: Part, layer: str, at: Position) -> bool:
                return part == "data" and at.epoch >= 4

        assert schedule_table(Own(), ["a"], 6).splitlines()[-1].split()[:6] == ["4", "-", "5", "all", "yes", "frozen"]
