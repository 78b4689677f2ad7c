"""The ``.cfg`` simple configuration: what AMCT makes of a text, this package makes of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from amct_lightning import RetrainConfig, create_quant_retrain_config
from amct_lightning.config import LayerConfig, QuantChoices, WeightConfig
from amct_lightning.config.simple_format import ParseError, parse_simple_config, read_simple_config
from amct_lightning.config.simple_schema import SIMPLE_SCHEMA
from tests.golden_data import ALL_CASES, model_case

CASES = [name for name, meta in ALL_CASES.items() if meta.get("simple_cfg") is not None]
ACCEPTED = [name for name in CASES if ALL_CASES[name]["status"] == "ok"]
WEIGHTS = "retrain_weight_quant_config"
DATA = "retrain_data_quant_config"


def generate(case: str, folder: Path) -> str:
    """Give the JSON text that a golden case's simple configuration leads to."""
    simple, config = folder / "simple.cfg", folder / "config.json"
    simple.write_text(ALL_CASES[case]["simple_cfg"])
    recorded = model_case(case)
    create_quant_retrain_config(str(config), recorded.float_model(), recorded.group("cal/"), str(simple))
    return config.read_text()


def for_layer(name: str, text: str) -> str:
    return f'override_layer_configs {{ layer_name: "{name}" {text} }}'


def for_type(kind: str, text: str) -> str:
    return f'override_layer_types {{ layer_type: "{kind}" {text} }}'


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    return {"conv1": nn.Conv2d(2, 8, 3), "conv2": nn.Conv2d(8, 12, 3), "fc": nn.Linear(12, 10)}


class TestGolden:
    """The JSON files that AMCT generated."""

    @pytest.mark.parametrize("case", ACCEPTED)
    @pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4", "ignore:.*named more than once")
    def test_the_generated_file_is_that_of_amct_to_the_byte(self, case: str, tmp_path: Path):
        assert generate(case, tmp_path) == ALL_CASES[case]["config_generated"]

    def test_int4_activations_are_accepted_where_they_can_be_exported(self, tmp_path: Path):
        """AMCT refuses them in this form and takes them in JSON."""
        with pytest.warns(UserWarning, match=r"simple\.cfg: INT8 is used instead of INT4 for 'conv1'"):
            raw = json.loads(generate("cnn_bn_relu__a4w4_cfg", tmp_path))
        for name, bits in (("conv1", "INT8"), ("conv2", "INT4"), ("fc", "INT4")):
            assert raw[name]["retrain_data_config"]["dst_type"] == bits
            assert raw[name]["retrain_weight_config"]["dst_type"] == bits

    def test_channel_wise_for_all_applies_to_the_layers_that_can_be(self, tmp_path: Path):
        """AMCT refuses a model with a Linear then."""
        raw = json.loads(generate("cnn_bn_relu__channel_wise_true_cfg", tmp_path))
        found = {name: raw[name]["retrain_weight_config"]["channel_wise"] for name in ("conv1", "conv2", "fc")}
        assert found == {"conv1": True, "conv2": True, "fc": False}

    def test_every_recorded_case_is_covered(self):
        assert set(CASES) - set(ACCEPTED) == {"cnn_bn_relu__a4w4_cfg", "cnn_bn_relu__channel_wise_true_cfg"}
        assert len(ACCEPTED) >= 13


class TestMeaning:
    """What single fields mean."""

    def test_an_empty_text_stands_for_the_defaults(self):
        assert parse_simple_config("") == QuantChoices(amct_rules=True)

    def test_the_two_skip_lists_of_a_kind_mean_the_same(self, layers: dict[str, nn.Module]):
        text = 'skip_layers: "conv1" quant_skip_layers: "fc" quant_skip_types: ["Linear"] skip_layer_types: "GRU"'
        choices = parse_simple_config(text)
        assert choices.skip_layers == ("conv1", "fc")
        assert choices.skip_types == ("GRU", "Linear")
        assert [name for name, layer in choices.resolve(layers).items() if layer.retrain_enable] == ["conv2"]

    def test_of_two_algorithms_the_later_counts(self):
        text = f"{WEIGHTS} {{ arq_retrain {{ channel_wise: false }} ulq_retrain {{ dst_type: INT4 }} }}"
        weight = parse_simple_config(text).defaults.retrain_weight_config
        assert (weight.algo, weight.channel_wise, weight.dst_type) == ("ulq_retrain", None, "INT4")

    def test_of_two_values_the_later_counts(self):
        assert parse_simple_config("batch_num: 2 batch_num: 3").batch_num == 3

    def test_clip_values_are_those_of_float32(self):
        text = f"{DATA} {{ ulq_quantize {{ clip_max_min {{ clip_max: 2.1 clip_min: -1 }} }} }}"
        data = parse_simple_config(text).defaults.retrain_data_config
        assert (data.clip_max, data.clip_min) == (torch.tensor(2.1).item(), -1.0)

    @pytest.mark.parametrize("given", ["true", "false"])
    def test_fixed_min_is_taken_over(self, given: str):
        data = parse_simple_config(f"{DATA} {{ ulq_quantize {{ fixed_min: {given} }} }}").defaults.retrain_data_config
        assert data.fixed_min is (given == "true")

    @pytest.mark.parametrize("block", [for_layer("conv1", ""), for_type("Conv2d", "prune_config {}")])
    def test_an_override_without_settings_gives_the_defaults(self, block: str, layers: dict[str, nn.Module]):
        """Against the settings for all layers, and against the skip lists as well."""
        text = f'skip_layers: "conv1" skip_layer_types: "Conv2d" {DATA} {{ ulq_quantize {{ dst_type: INT16 }} }}'
        with pytest.warns(UserWarning, match=r"my\.cfg: override_layer_\w+ for '(conv1|Conv2d)' holds no settings"):
            choices = parse_simple_config(f"{text} {block}", "my.cfg")
        config = choices.resolve(layers)
        assert config["conv1"] == LayerConfig(retrain_weight_config=WeightConfig(channel_wise=True))
        assert config["fc"].retrain_data_config.dst_type == "INT16"

    @pytest.mark.filterwarnings("ignore:.*holds no settings")
    def test_an_override_without_settings_may_name_nothing(self, layers: dict[str, nn.Module]):
        choices = parse_simple_config(f"{for_layer('nope', '')} {for_type('ReLU', '')}")
        assert choices.resolve(layers) == QuantChoices().resolve(layers)

    def test_empty_pruning_is_none(self, layers: dict[str, nn.Module]):
        """As in one of AMCT's own samples."""
        settings = f"prune_config {{}} {DATA} {{}}"
        choices = parse_simple_config(f"prune_config {{}} {for_layer('fc', settings)}")
        assert choices.resolve(layers) == QuantChoices().resolve(layers)

    def test_pruning_of_a_type_is_passed_over(self, layers: dict[str, nn.Module]):
        with pytest.warns(UserWarning, match="override_layer_types for 'Linear': prune_config has no effect"):
            choices = parse_simple_config(for_type("Linear", f"prune_config {{ {PRUNER} }} {DATA} {{}}"))
        assert choices.resolve(layers) == QuantChoices().resolve(layers)

    def test_an_override_with_empty_settings_is_one(self, layers: dict[str, nn.Module]):
        choices = parse_simple_config(f'skip_layers: "conv1" {for_layer("conv1", f"{DATA} {{}}")}')
        assert choices.resolve(layers)["conv1"].retrain_enable

    def test_names_are_no_patterns(self, layers: dict[str, nn.Module]):
        with pytest.raises(ValueError, match=r"^my\.cfg: cannot skip layer 'conv\*'"):
            parse_simple_config('skip_layers: "conv*"').resolve(layers, "my.cfg")

    def test_it_is_also_read_without_a_json_file_between(self, tmp_path: Path):
        path = tmp_path / "simple.cfg"
        path.write_text('batch_num: 4 skip_layer_types: "Linear"')
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
        config = RetrainConfig.from_simple_config(path, model, torch.ones(1, 1, 3, 3))
        assert config.batch_num == 4
        assert {name: layer.retrain_enable for name, layer in config.items()} == {"0": True, "2": False}


PRUNER = "filter_pruner { balanced_l2_norm_filter_prune { prune_ratio: 0.3 ascend_optimized: false } }"
SELECTIVE = "n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 update_freq: 2 } }"
CLIPS = f"{DATA} {{ ulq_quantize {{ clip_max_min {{ %s }} }} }}"

REFUSED: dict[str, tuple[str, str]] = {
    "prune_config": (f"prune_config {{ {PRUNER} }}", "'prune_config' is not expected.*does not prune"),
    "prune_config_selective": (f"prune_config {{ {SELECTIVE} }}", "'prune_config' is not expected"),
    "prune_skip_layers": ('regular_prune_skip_layers: "fc"', "'regular_prune_skip_layers' is not expected"),
    "prune_skip_types": ('regular_prune_skip_types: "Linear"', "'regular_prune_skip_types' is not expected"),
    "prune_of_layer": (
        for_layer("fc", f"prune_config {{ {PRUNER} }}"),
        "override_layer_configs for 'fc': 'prune_config' is not expected",
    ),
    "clip_min_only": (CLIPS % "clip_min: -1", "clip_max and clip_min are both required, found clip_min"),
    "no_clips": (CLIPS % "", "clip_max and clip_min are both required, found none"),
    "clip_max_negative": (CLIPS % "clip_max: -1 clip_min: -1", r"clip_max' must be .* above 0, found -1\.0"),
    "clip_nan": (CLIPS % "clip_max: nan clip_min: -1", "clip_max' must be a finite number"),
    "clip_overflow": (CLIPS % "clip_max: 1e300 clip_min: -1", "clip_max' must be a finite number"),
    "a16w4": (
        f"{DATA} {{ ulq_quantize {{ dst_type: INT16 }} }} {WEIGHTS} {{ arq_retrain {{ dst_type: INT4 }} }}",
        "dst_type' is INT16 while that of the weights is INT4",
    ),
    "a4w8_of_layer": (
        for_layer("fc", f"{DATA} {{ ulq_quantize {{ dst_type: INT4 }} }}"),
        "override_layer_configs for 'fc': key '.*dst_type' is INT4 while that of the weights is INT8",
    ),
    "repeated_type": (
        for_type("Linear", f"{DATA} {{}}") * 2,
        r"override_layer_types: repeated for \['Linear'\]",
    ),
    "override_unknown_layer": (for_layer("fcc", f"{DATA} {{}}"), "layer 'fcc'.* Did you mean 'fc'"),
    "override_unknown_type": (for_type("ReLU", f"{DATA} {{}}"), "layer type 'ReLU'.*Conv2d"),
    "override_without_name": (f"override_layer_configs {{ {DATA} {{}} }}", "layer '', but the model has no such"),
    "quant_skip_unknown_layer": ('quant_skip_layers: "conv3"', "cannot skip layer 'conv3'.* Did you mean 'conv"),
    "channel_wise_linear": (
        for_layer("fc", f"{WEIGHTS} {{ arq_retrain {{ channel_wise: true }} }}"),
        "layer 'fc'.*can not be channel-wise",
    ),
}
UNPARSABLE: dict[str, tuple[str, int, str]] = {
    "misspelt_field": ("\nbatchnum: 3", 2, "no field 'batchnum'.*Did you mean 'batch_num'"),
    "misspelt_inner_field": (f"{WEIGHTS} {{ arq {{}} }}", 1, r"'arq'; its fields are arq_retrain, ulq_retrain\."),
    "unknown_word": (f"{DATA} {{ ulq_quantize {{ dst_type: INT2 }} }}", 1, "'INT2' must be INT4 or INT8 or INT16"),
    "precision_default": ("fakequant_precision_mode: DEFAULT", 1, "must be FORCE_FP16_QUANT; leave the field out"),
    "open_brace": (f"{DATA} {{", 1, "Expected"),
    "not_a_number": ("batch_num: many", 1, "many"),
    "bad_escape": ('skip_layers: "\\xff"', 1, "0xff"),
    "any": ("[type.googleapis.com/a.b] {}", 1, "does not have extensions"),
}


class TestErrors:
    """Each error names the file, the culprit and what is allowed."""

    @pytest.mark.parametrize("case", REFUSED)
    def test_refused_content(self, case: str, layers: dict[str, nn.Module]):
        text, message = REFUSED[case]
        with pytest.raises(ValueError, match=rf"^my\.cfg: .*{message}"):
            parse_simple_config(text, "my.cfg").resolve(layers, "my.cfg")

    @pytest.mark.parametrize("case", UNPARSABLE)
    def test_a_text_that_cannot_be_parsed_can_be_caught_as_in_amct(self, case: str):
        text, line, problem = UNPARSABLE[case]
        message = rf"^my\.cfg: line {line}: not a simple configuration: .*{problem}"
        with pytest.raises(text_format.ParseError, match=message) as caught:
            parse_simple_config(text, "my.cfg")
        assert isinstance(caught.value, ValueError)

    def test_a_message_does_not_repeat_an_endless_line(self):
        with pytest.raises(ParseError) as caught:
            parse_simple_config("batch_num: " + "9" * 10**5)
        assert len(str(caught.value)) < 500

    def test_a_binary_file_is_refused(self, tmp_path: Path):
        path = tmp_path / "simple.cfg"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"simple\.cfg: not a text file in UTF-8"):
            read_simple_config(path)

    def test_existing_files_stay_as_they_are(self, tmp_path: Path):
        config, simple = tmp_path / "config.json", tmp_path / "simple.cfg"
        config.write_text("precious")
        simple.write_text('skip_layers: "nope"')
        with pytest.raises(ValueError, match=r"simple\.cfg: cannot skip layer 'nope'"):
            create_quant_retrain_config(str(config), nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), str(simple))
        assert config.read_text() == "precious"


def test_the_schema_has_the_numbers_of_the_contract():
    numbers = {line.name: line.number for line in SIMPLE_SCHEMA.messages["AMCTRetrainConfig"]}
    assert list(numbers.values()) == [*range(1, 13), 21]
    assert numbers["quant_skip_types"] == 12
    assert numbers["fakequant_precision_mode"] == 21


NAMES = sorted({line.name for fields in SIMPLE_SCHEMA.messages.values() for line in fields})
WORDS = [*NAMES, "{", "}", ":", "[", "]", ",", "-1", "0", "2.5", "nan", "INT4", "INT8", "true", '"fc"', '""', "#", "\n"]
TEXTS = st.one_of(
    st.binary(), st.text().map(str.encode), st.lists(st.sampled_from(WORDS)).map(" ".join).map(str.encode)
)


@st.composite
def nested_texts(draw: st.DrawFn, message: str = "AMCTRetrainConfig") -> str:
    """Text that follows the schema, with any values."""
    parts = []
    for line in draw(st.lists(st.sampled_from(SIMPLE_SCHEMA.messages[message]), max_size=4)):
        if line.type in SIMPLE_SCHEMA.messages:
            parts.append(f"{line.name} {{ {draw(nested_texts(line.type))} }}")
        else:
            words: dict[str, Any] = {"string": ['"conv1"', '"fc"', '"Linear"', '"x"'], "bool": ["true", "false"]}
            value = draw(st.sampled_from(words.get(line.type) or ["1", "2", "0", "-1", "INT4", "1.5"]))
            parts.append(f"{line.name}: {value}")
    return " ".join(parts)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=TEXTS | nested_texts().map(str.encode))
def test_any_bytes_give_a_configuration_or_a_plain_error(data: bytes, tmp_path: Path, layers: dict[str, nn.Module]):
    path = tmp_path / "simple.cfg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = read_simple_config(path).resolve(layers, str(path))
        except ValueError as error:
            assert str(path) in str(error)
            return
    assert RetrainConfig.from_dict(json.loads(config.to_text())) == config
