"""What is known of the generations of hardware: complete, with a source, and without a word of this package's own."""

from __future__ import annotations

import ast
import contextlib
import itertools
import sys
from pathlib import Path
from typing import get_args

import pytest

import amct_lightning.targets
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig
from amct_lightning.layer_types import LAYER_TYPES
from amct_lightning.targets import ATC_TARGETS, TARGETS, Target, TargetName, find_target

VERDICTS = {
    "A2": {"A8W8": "runs", "A16W8": "doubtful", "A8W4": "doubtful", "A4W4": "doubtful"},
    "A3": {"A8W8": "runs", "A16W8": "doubtful", "A8W4": "doubtful", "A4W4": "doubtful"},
    "950": {"A8W8": "runs", "A16W8": "doubtful", "A8W4": "unsupported", "A4W4": "unsupported"},
    "310P": {"A8W8": "runs", "A16W8": "doubtful", "A8W4": "doubtful", "A4W4": "doubtful"},
}
SERVERS = "serving", "serving_bfloat16", "serving_float16"
VERDICTS |= {
    name: {"A8W8": "runs", "A16W8": "unsupported", "A8W4": "unsupported", "A4W4": "unsupported"} for name in SERVERS
}
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)


def test_there_is_one_entry_for_each_name() -> None:
    assert tuple(TARGETS) == get_args(TargetName) == tuple(VERDICTS)


@targets
def test_each_pair_of_types_that_can_be_configured_has_its_verdict(target: Target) -> None:
    for data, weight in itertools.product(("INT4", "INT8", "INT16"), ("INT4", "INT8")):
        with contextlib.suppress(ValueError):
            LayerConfig(True, DataConfig(dst_type=data), WeightConfig(dst_type=weight))
            assert (data, weight) in target.pairs
    bits = {f"A{data[3:]}W{weight[3:]}": fact.verdict for (data, weight), fact in target.pairs.items()}
    assert bits == VERDICTS[target.name]


@targets
def test_each_layer_type_has_its_verdict(target: Target) -> None:
    assert set(target.layers) == {kind.__name__ for kind in LAYER_TYPES}
    by_verdict: dict[str, set[str]] = {}
    for kind, fact in target.layers.items():
        by_verdict.setdefault(fact.verdict, set()).add(kind)
    if target.name in SERVERS:
        others = {kind.__name__ for kind in LAYER_TYPES} - {"Linear"}
        assert by_verdict == {"runs": {"Linear"}, "unsupported": others}
        return
    assert by_verdict == {
        "runs": {"Linear", "Conv2d", "Conv3d", "ConvTranspose2d"},
        "unsupported": {"Conv1d", "ConvTranspose1d", "GRU"},
        "doubtful": {"LSTM", "ConvTranspose3d"},
    }


@targets
def test_a_target_is_a_generation_that_atc_compiles_for_or_servers_in_some_dtypes(target: Target) -> None:
    assert (target.atc is None) == (target.name in SERVERS) == target.serves
    assert (target.name in ATC_TARGETS) == (target.atc is not None)
    servers = ("runs", "runs", "runs", "doubtful")
    generation = ("unsupported", "doubtful", "doubtful", "doubtful")
    facts = target.linear_by_channel, target.per_token, target.weight_only["INT8"], target.weight_only["INT4"]
    assert tuple(fact.verdict for fact in facts) == (servers if target.serves else generation)


def test_the_servers_take_the_dtype_of_the_model_or_a_given_one() -> None:
    assert {name: TARGETS[name].serves_in for name in SERVERS} == {
        "serving": ("bfloat16", "float16"),
        "serving_bfloat16": ("bfloat16",),
        "serving_float16": ("float16",),
    }


@targets
def test_a_fact_has_a_source_or_says_that_it_was_not_checked(target: Target) -> None:
    facts = [*target.pairs.values(), *target.layers.values(), target.grouped, target.linear_by_channel]
    for fact in [*facts, target.per_token, *target.weight_only.values()]:
        assert fact.source.startswith(("[read]", "[doc]")) or (fact.source == "none" and "not checked" in fact.why)


@pytest.mark.parametrize("name", ATC_TARGETS)
def test_the_processors_belong_to_one_target_only(name: str) -> None:
    atc = ATC_TARGETS[name]
    for example in (*atc.soc_examples, *filter(None, [atc.soc_version])):
        assert [other for other, one in ATC_TARGETS.items() if example.startswith(one.soc_prefix)] == [name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("A2", "A2"),
        ("a3", "A3"),
        ("950", "950"),
        (950, "950"),
        ("310p", "310P"),
        ("SERVING_float16", "serving_float16"),
    ],
)
def test_a_name_may_be_in_small_letters_or_a_number(name: object, found: str) -> None:
    assert find_target(name).name == found


@pytest.mark.parametrize("name", ["A1", 910, "", None])
def test_an_unknown_name_is_refused_with_those_that_there_are(name: object) -> None:
    with pytest.raises(
        ValueError, match=r"^target=.*no such target. Give one of 'A2' \(Atlas A2\), .*'310P'.*'serving'"
    ):
        find_target(name)


def test_only_the_standard_library_is_imported() -> None:
    for path in Path(amct_lightning.targets.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("amct_lightning.targets") or name.split(".")[0] in sys.stdlib_module_names
