"""What a schedule wants after the last epoch of a training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from amct_lightning import QuantRetrainCallback
from tests.callbacks.conftest import BATCHES, Net, TrainerFactory, loader


def warned(make_trainer: TrainerFactory, schedule: dict[str, Any], **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer(callbacks=[QuantRetrainCallback(schedule=schedule)], **arguments).fit(Net(), loader())
    return [str(warning.message) for warning in found if "the last epoch" in str(warning.message)]


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        ({"freeze_bn": 3}, "QuantSchedule: freeze_bn=3 never happens"),
        ({"freeze_data": 7}, "QuantSchedule: freeze_data=7 never happens"),
        ({"freeze_weights": 0.9}, "QuantSchedule: freeze_weights=0.9 (epoch 3) never happens"),
        ({"start": 3, "calibrate": 1}, "QuantSchedule: start=3 never happens"),
        ({"calibrate": [0, 5]}, "QuantSchedule: calibrate=[0, 5] (epoch 5) never happens"),
        ({"layers": {"net.*": {"freeze_data": 4}}}, "QuantSchedule.layers['net.*']: freeze_data=4 never happens"),
        (
            {"freeze_bn": 3, "freeze_data": 4},
            "QuantSchedule: freeze_data=4 and QuantSchedule: freeze_bn=3 never happen",
        ),
    ],
)
def test_a_field_beyond_the_end_is_named(make_trainer: TrainerFactory, schedule: dict[str, Any], named: str) -> None:
    (message,) = warned(make_trainer, schedule, max_epochs=3)
    assert message.startswith(f"{named}: the last epoch of this training is 2, counted from 0.")


@pytest.mark.parametrize(
    ("steps", "arguments", "is_beyond"),
    [
        (2 * BATCHES, {"max_epochs": -1}, True),
        (2 * BATCHES + 1, {"max_epochs": -1}, False),
        (2 * BATCHES, {"max_epochs": 10}, True),
        (BATCHES, {"max_epochs": 10, "accumulate_grad_batches": 2}, True),
        (BATCHES + 1, {"max_epochs": 10, "accumulate_grad_batches": 2}, False),
        (100, {"max_epochs": 3}, False),
    ],
)
def test_the_end_may_be_one_of_steps(
    make_trainer: TrainerFactory, steps: int, arguments: dict[str, Any], is_beyond: bool
) -> None:
    found = warned(make_trainer, {"freeze_bn": 2}, max_steps=steps, **arguments)
    assert [message.partition(", counted")[0] for message in found] == is_beyond * [
        "QuantSchedule: freeze_bn=2 never happens: the last epoch of this training is 1"
    ]


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ({"freeze_bn": 2, "freeze_data": 0.6}, {"max_epochs": 3}),
        ({"freeze_bn": 1.0}, {"max_epochs": 3}),  # the documented way to write never
        ({"freeze_bn": 5}, {"fast_dev_run": True}),
    ],
)
def test_nothing_is_said_otherwise(
    make_trainer: TrainerFactory, schedule: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert warned(make_trainer, schedule, **arguments) == []
