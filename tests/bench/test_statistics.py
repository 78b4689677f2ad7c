"""Medians, quartiles, ratios and verdicts, from given times."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench.compare import verdict
from tests.benchmarks.bench.measuring import _ratios
from tests.benchmarks.bench.results import Clocks, Spread
from tests.benchmarks.bench.variants import COMPILED, FP32, LOOP
from tests.benchmarks.timing import Seconds, in_turns, medians


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.25, 1.5, 1.75)


def test_a_single_value_has_no_spread() -> None:
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5)


def test_a_spread_is_written_with_its_quartiles() -> None:
    assert str(Spread(1.0, 1.25, 1.5)) == "1.25 (1.00-1.50)"


def test_ratios_are_those_of_the_same_round() -> None:
    base = [Seconds(1.0, 2.0), Seconds(10.0, 1.0), Seconds(100.0, 4.0)]
    seconds = [Seconds(2.0, 2.0), Seconds(20.0, 2.0), Seconds(200.0, 16.0)]
    ratio = Clocks.ratio(seconds, base)
    assert ratio.wall == Spread(2.0, 2.0, 2.0)  # the rounds differ by 100, the ratio does not
    assert ratio.cpu == Spread.of([1.0, 2.0, 4.0])


def test_ratios_need_equally_many_rounds() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Clocks.ratio([Seconds(1.0, 1.0)], [])


def test_only_a_compiled_network_is_compared_with_the_compiled_float_one() -> None:
    names = (FP32, LOOP, FP32 + COMPILED, "amct_lightning", "amct_lightning" + COMPILED)
    seconds = {name: [Seconds(1.0, 1.0)] for name in names}
    assert list(_ratios(FP32, seconds)) == [LOOP]
    assert list(_ratios("amct_lightning", seconds)) == [FP32, LOOP]
    assert list(_ratios("amct_lightning" + COMPILED, seconds)) == [FP32, LOOP, FP32 + COMPILED]


def test_steps_take_turns_and_each_is_the_first_in_turn() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = in_turns(steps, rounds=3, warm_up=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(order[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab"] * 2


def test_medians_are_of_the_wall_clock() -> None:
    assert set(medians({"a": list, "b": list}, rounds=1)) == {"a", "b"}


@pytest.mark.parametrize(
    ("ratio", "control", "said"),
    [
        (Spread(1.05, 1.1, 1.2), Spread(0.98, 1.0, 1.02), "slower"),
        (Spread(0.8, 0.9, 0.95), Spread(0.98, 1.0, 1.02), "faster"),
        (Spread(1.01, 1.1, 1.2), Spread(0.98, 1.0, 1.02), "as fast"),
        (Spread(1.05, 1.1, 1.2), Spread(1.0, 1.1, 1.2), "as fast"),
    ],
)
def test_a_ratio_counts_only_outside_of_the_noise_of_the_control(ratio: Spread, control: Spread, said: str) -> None:
    assert verdict(ratio, control) == said
