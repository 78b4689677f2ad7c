"""The friendly form: a few choices as a dict or a YAML file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from amct_lightning.config import DataConfig, LayerConfig, QuantChoices, RetrainConfig, WeightConfig
from amct_lightning.config.friendly import KEYS, parse_choices, read_yaml_config
from amct_lightning.config.json_format import DATA_KEYS, WEIGHT_KEYS
from tests.config.strategies import JSON_VALUES

EXAMPLE = """
batch_num: 2
activations: {dst_type: INT8, clip_max: 3, clip_min: -3.5}
weights: {algo: ulq_retrain, channel_wise: true}
types:
  Linear: {weights: {dst_type: INT4}}
layers:
  "blocks.*.fc1": {activations: {dst_type: INT16, fixed_min: true}}
skip_layers: [head, 0.10]
skip_types: [ConvTranspose2d]
fakequant_precision_mode: FORCE_FP16_QUANT
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write a text or bytes to my.yaml and give its path."""

    def _write(content: str | bytes) -> Path:
        path = tmp_path / "my.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def test_a_binary_file_is_refused(write):
    with pytest.raises(ValueError, match=r"my\.yaml: not a text file in UTF-8"):
        read_yaml_config(write(b"\xff\xfe"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"No such config file; check the path.*none\.yaml"):
        read_yaml_config(tmp_path / "none.yaml")


class TestMeaning:
    """What the keys mean."""

    def test_a_file_with_every_key(self, write):
        activations = DataConfig(clip_max=3.0, clip_min=-3.5)
        assert read_yaml_config(write(EXAMPLE)) == QuantChoices(
            batch_num=2,
            fakequant_precision_mode="FORCE_FP16_QUANT",
            defaults=LayerConfig(True, activations, WeightConfig("ulq_retrain", channel_wise=True)),
            types={"Linear": LayerConfig(True, activations, WeightConfig("ulq_retrain", True, "INT4"))},
            layers={
                "blocks.*.fc1": LayerConfig(
                    True, DataConfig("ulq_quantize", 3.0, -3.5, True, "INT16"), WeightConfig("ulq_retrain", True)
                )
            },
            skip_layers=("head", "0.10"),
            skip_types=("ConvTranspose2d",),
        )

    def test_a_dict_means_what_the_file_means(self, write):
        raw = yaml.safe_load(EXAMPLE.replace("0.10", "'0.10'"))
        assert parse_choices(raw) == read_yaml_config(write(EXAMPLE))

    @pytest.mark.parametrize("text", ["", "# nothing", "{}", "layers:\nskip_layers:\nbatch_num:\nactivations:"])
    def test_nothing_chosen_are_the_defaults(self, text: str, write):
        assert read_yaml_config(write(text)) == QuantChoices()

    def test_an_entry_gives_only_what_differs_from_the_top(self):
        """In a .cfg file it replaces the settings at the top completely."""
        raw = {"weights": {"algo": "ulq_retrain"}, "layers": {"fc": {"activations": {"dst_type": "INT16"}}}}
        layer = parse_choices(raw).layers["fc"]
        assert layer == LayerConfig(True, DataConfig(dst_type="INT16"), WeightConfig("ulq_retrain"))

    def test_an_entry_by_name_does_not_build_on_one_by_type(self):
        raw = {"types": {"Linear": {"weights": {"dst_type": "INT4"}}}, "layers": {"fc": {}}}
        assert parse_choices(raw).layers["fc"] == LayerConfig()

    def test_null_in_an_entry_goes_back_to_the_default(self):
        raw = {
            "activations": {"clip_max": 1.0, "clip_min": -1.0},
            "layers": {"fc": {"activations": {"clip_max": None, "clip_min": None}}},
        }
        assert parse_choices(raw).layers["fc"] == LayerConfig()

    @pytest.mark.parametrize("entry", [None, {}, {"weights": None}])
    def test_an_empty_entry_quantizes_a_layer_whose_type_is_to_be_skipped(self, entry: Any):
        choices = parse_choices({"skip_types": ["Linear"], "layers": {"a": entry}})
        config = choices.resolve({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        assert [layer.retrain_enable for layer in config.values()] == [True, False]

    @pytest.mark.parametrize("entry", [{"activations": {"dst_type": "INT16"}}, {"weights": {"channel_wise": None}}])
    def test_channel_wise_at_the_top_holds_for_linear_layers_unless_an_entry_says_otherwise(self, entry: Any):
        raw = {"weights": {"channel_wise": True}, "types": {"Linear": entry}}
        config = parse_choices(raw).resolve({"a": nn.Conv2d(2, 2, 1), "b": nn.Linear(2, 2)})
        found = [layer.retrain_weight_config.channel_wise for layer in config.values()]
        assert found == [True, "activations" in entry]

    def test_channel_wise_false_at_the_top_holds_for_entries(self):
        raw = {"weights": {"channel_wise": False}, "layers": {"a": {"activations": {"dst_type": "INT16"}}}}
        config = parse_choices(raw).resolve({"a": nn.Conv2d(2, 2, 1)})
        assert config["a"].retrain_weight_config.channel_wise is False

    def test_clip_values_may_be_integers(self):
        data = parse_choices({"activations": {"clip_max": 2, "clip_min": -1}}).defaults.retrain_data_config
        assert (data.clip_max, data.clip_min) == (2.0, -1.0)
        assert isinstance(data.clip_max, float)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([], TypeError, r"must be a mapping .* found \[\] \(list\)"),
    "unknown_key": ({"weihgts": {}}, ValueError, "'weihgts' is not known .* Did you mean 'weights'"),
    "json_content": ({"conv1": {}}, ValueError, "'conv1' is not known .*JSON configuration needs the key 'version'"),
    "unknown_setting": ({"weights": {"dtype": "INT4"}}, ValueError, r"'weights\.dtype'.*Did you mean 'dst_type'"),
    "unknown_in_entry": ({"layers": {"fc": {"dst_type": 1}}}, ValueError, "layers 'fc': key 'dst_type' is not known"),
    "batch_num": ({"batch_num": "2"}, TypeError, r"'batch_num' must be an integer, found '2'"),
    "batch_num_zero": ({"batch_num": 0}, ValueError, "'batch_num' must be at least 1"),
    "mode": ({"fakequant_precision_mode": "FP16"}, ValueError, "'DEFAULT' or 'FORCE_FP16_QUANT', found 'FP16'"),
    "activations": ({"activations": "INT8"}, TypeError, "'activations' must be a mapping .* found 'INT8'"),
    "clip_zero": ({"activations": {"clip_max": 0, "clip_min": -1}}, ValueError, r"activations\.clip_max' .* above 0"),
    "clip_bool": ({"activations": {"clip_max": True, "clip_min": -1}}, TypeError, r"activations\.clip_max'"),
    "clip_huge": ({"activations": {"clip_max": 10**400, "clip_min": -1}}, TypeError, r"activations\.clip_max'"),
    "one_clip": ({"activations": {"clip_max": 1}}, ValueError, "clip_max' comes without clip_min"),
    "pair": ({"activations": {"dst_type": "INT4"}}, ValueError, r"activations\.dst_type' is INT4 .* INT8"),
    "pair_in_entry": (
        {"weights": {"dst_type": "INT4"}, "types": {"Linear": {"activations": {"dst_type": "INT16"}}}},
        ValueError,
        r"types 'Linear': key 'activations\.dst_type' is INT16 while that of the weights is INT4",
    ),
    "w16": ({"weights": {"dst_type": "INT16"}}, ValueError, r"weights\.dst_type' must be 'INT4' or 'INT8'"),
    "layers_list": ({"layers": ["fc"]}, TypeError, "'layers' must be a mapping"),
    "layer_number": ({"layers": {0: {}}}, TypeError, r"'layers' .*in quotes.*found 0 \(int\)"),
    "entry_word": ({"layers": {"fc": "INT4"}}, TypeError, "layers 'fc' must hold activations and weights"),
    "skip_word": ({"skip_layers": "fc"}, TypeError, "'skip_layers' must be a list of names"),
    "skip_number": ({"skip_types": [1]}, TypeError, "'skip_types' must be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_names_source_and_culprit(case: str):
    raw, kind, message = REFUSED[case]
    with pytest.raises(kind, match=rf"^my dict: .*{message}") as caught:
        parse_choices(raw, "my dict")
    assert type(caught.value) is kind


MODEL = {"conv": nn.Conv2d(4, 4, 1), "fc": nn.Linear(4, 2)}
WORDS = ["conv", "fc", "*", "Linear", "INT4", "INT8", "INT16", *KEYS, *DATA_KEYS, *WEIGHT_KEYS]
SYNTAX = [
    *WORDS,
    ":",
    " ",
    "\n",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&a",
    "*a",
    "!!int",
    "'",
    '"',
    "1",
    "-2.5",
    "#",
    "?",
    "|",
]
SOUP = st.lists(st.sampled_from(SYNTAX)).map(" ".join)


def settings_of(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    values = (
        st.sampled_from(["INT4", "INT8", "arq_retrain", "ulq_quantize", True, False, None, 1, 1.5, -1]) | JSON_VALUES
    )
    return st.dictionaries(st.sampled_from(keys), values, max_size=2)


SECTIONS = st.fixed_dictionaries(
    {}, optional={"activations": settings_of(*DATA_KEYS), "weights": settings_of(*WEIGHT_KEYS)}
)
NAME_LISTS = st.lists(st.sampled_from(["conv", "fc", "f*", "GRU", "Linear"]), max_size=2)
NEARLY_VALID = st.builds(
    lambda run, sections: run | sections,
    st.fixed_dictionaries(
        {},
        optional={
            "batch_num": st.integers(0, 3) | JSON_VALUES,
            "types": st.dictionaries(st.sampled_from(["Conv2d", "Linear"]), SECTIONS, max_size=2),
            "layers": st.dictionaries(st.sampled_from(["conv", "f*", "x"]), SECTIONS, max_size=2) | JSON_VALUES,
            "skip_layers": NAME_LISTS | JSON_VALUES,
            "skip_types": NAME_LISTS,
        },
    ),
    SECTIONS,
)


def check(read: Any, source: str) -> None:
    """Read choices; they must resolve to a configuration that survives JSON, or be refused with a plain error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = read().resolve(MODEL, source)
        except (ValueError, TypeError) as error:
            assert str(error).startswith(source)
            return
    assert RetrainConfig.from_dict(json.loads(config.to_text())) == config


@settings(deadline=None)
@given(raw=NEARLY_VALID | JSON_VALUES | st.dictionaries(st.sampled_from([*KEYS, "", 0, None, (), True]), JSON_VALUES))
def test_any_dict_gives_a_configuration_or_a_plain_error(raw: Any):
    check(lambda: parse_choices(raw, "my dict"), "my dict")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary()
    | st.text().map(str.encode)
    | SOUP.map(str.encode)
    | NEARLY_VALID.map(yaml.safe_dump).map(str.encode)
)
def test_any_bytes_give_a_configuration_or_a_plain_error(data: bytes, write):
    path = write(data)
    check(lambda: read_yaml_config(path), str(path))
