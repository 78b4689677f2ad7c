"""``amct-lightning config``."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amct_lightning import QuantRecord, RetrainConfig, create_quant_retrain_config
from amct_lightning.commands.choices_text import in_few_words, to_simple, to_yaml
from amct_lightning.commands.model_input import make_tensor
from amct_lightning.config import DataConfig, LayerConfig, QuantChoices, WeightConfig, load_config
from amct_lightning.config.friendly import parse_choices
from amct_lightning.config.simple_format import parse_simple_config
from amct_lightning.config.text_file import parse_yaml
from tests.cli.conftest import Folder

MODEL = ("config", "--model", "demo_module.Classifier")
LAYERS: dict[str, nn.Module] = {
    "stem": nn.Conv2d(4, 8, 3),
    "depthwise.0": nn.Conv2d(8, 8, 3, groups=8),
    "up": nn.ConvTranspose2d(8, 8, 2),
    "head": nn.Linear(8, 2),
}
settings_of_layers = st.builds(
    lambda enable, clips, fixed_min, bits, algo, channel_wise: LayerConfig(
        enable,
        DataConfig(clip_max=clips, clip_min=None if clips is None else -1.5, fixed_min=fixed_min, dst_type=bits[0]),
        WeightConfig(algo=algo, channel_wise=channel_wise, dst_type=bits[1]),
    ),
    st.booleans(),
    st.sampled_from([None, 2.5]),
    st.sampled_from([None, True, False]),
    st.sampled_from([("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4"), ("INT4", "INT4")]),
    st.sampled_from(["arq_retrain", "ulq_retrain"]),
    st.sampled_from([None, False, True]),
)


def enabled(config: RetrainConfig) -> dict[str, LayerConfig]:
    return {name: layer for name, layer in config.items() if layer.retrain_enable}


@pytest.mark.filterwarnings("ignore:.*INT8 is used instead of INT4.*")
@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(LAYERS, settings_of_layers)),
    st.integers(1, 9),
    st.sampled_from(["DEFAULT", "FORCE_FP16_QUANT"]),
)
def test_few_words_mean_the_same_as_the_complete_configuration(
    layers: dict[str, LayerConfig], batches: int, mode: str
) -> None:
    layers["head"] = LayerConfig(True, layers["head"].retrain_data_config, layers["head"].retrain_weight_config)
    complete = RetrainConfig(batch_num=batches, fakequant_precision_mode=mode, layers=layers).resolve(LAYERS)
    choices = in_few_words(complete, LAYERS)
    forms = [parse_choices(parse_yaml(to_yaml(choices), "yaml"))]
    if not complete["head"].retrain_weight_config.channel_wise:  # which AMCT's form cannot say of a Linear
        forms.append(parse_simple_config(to_simple(choices)))
    for again in forms:
        resolved = again.resolve(LAYERS)
        assert enabled(resolved) == enabled(complete)
        assert (resolved.batch_num, resolved.fakequant_precision_mode) == (batches, mode)


def test_names_that_yaml_would_take_for_something_else_stay_names() -> None:
    layers: dict[str, nn.Module] = dict.fromkeys(["0", "1.10", "no", "null", "a b: #"], nn.Linear(4, 4))
    wide = LayerConfig(True, DataConfig(dst_type="INT16"))
    choices = QuantChoices(skip_layers=("1.10", "no", "null"), layers={"a b: #": wide})
    complete = choices.resolve(layers)
    text = to_yaml(in_few_words(complete, layers))
    assert enabled(parse_choices(parse_yaml(text, "yaml")).resolve(layers)) == enabled(complete)


def test_json_is_that_of_create_quant_retrain_config_to_the_byte(folder: Folder) -> None:
    assert folder(*MODEL, "-o", "cli.json").out == "Wrote the configuration to 'cli.json'.\n"
    model = runpy.run_path("demo_module.py")["Classifier"]()
    create_quant_retrain_config("api.json", model, torch.zeros(1, 1, 8, 8))
    assert (folder / "cli.json").read_bytes() == (folder / "api.json").read_bytes()
    assert folder(*MODEL).out.rstrip("\n").encode() == (folder / "api.json").read_bytes().rstrip(b"\n")


@pytest.mark.parametrize("form", ["json", "cfg", "yaml"])
def test_from_config_by_fit_to_the_record_in_the_checkpoint(folder: Folder, form: str) -> None:
    (folder / "choices.yaml").write_text("{weights: {dst_type: INT4}, skip_layers: [net.0]}")
    written = f"made.{form}"
    assert folder(*MODEL, "--choices", "choices.yaml", "--format", form, "-o", written).status == 0
    run = folder.run_yaml(trainer={"enable_checkpointing": True, "max_epochs": 1})
    assert folder("fit", "--config", run, "--quant.config", written).status == 0
    (checkpoint,) = folder.path.rglob("*.ckpt")
    assert folder("record", "extract", str(checkpoint), "-o", "extracted.txt").status == 0
    assert (folder / "extracted.txt").read_bytes() == (folder / "record.txt").read_bytes()
    record = QuantRecord.load(folder / "extracted.txt")
    assert {name: layer.wts_type for name, layer in record.items()} == {"net.4": "INT4"}


def test_a_rule_for_fixed_min_becomes_what_the_format_can_say(folder: Folder) -> None:
    (folder / "choices.yaml").write_text("activations: {fixed_min: propagate}")
    written = {form: folder(*MODEL, "--choices", "choices.yaml", "--format", form).out for form in ("json", "cfg")}
    for form, text in written.items():
        (folder / f"made.{form}").write_text(text)
        made = load_config(folder / f"made.{form}")
        settings = [
            made.layers[name].retrain_data_config.fixed_min for name in ("net.0", "net.4") if name in made.layers
        ]
        assert settings.count(True) == 1
    assert written["json"].count("fixed_min") == 1
    assert folder(*MODEL, "-o", "amct.json").status == 0
    assert "fixed_min" not in (folder / "amct.json").read_text()
    again = folder(*MODEL, "--choices", "amct.json", "--format", "yaml").out
    assert "fixed_min: after_relu" in again
    assert "fixed_min" not in folder(*MODEL, "--format", "yaml").out


BY_CHANNEL = "{weights: {channel_wise: true}}"


@pytest.mark.parametrize("form", ["json", "cfg"])
def test_amct_s_formats_cannot_say_that_a_linear_layer_has_a_scale_per_channel(folder: Folder, form: str) -> None:
    (folder / "choices.yaml").write_text(BY_CHANNEL)
    status, _, err = folder(*MODEL, "--choices", "choices.yaml", "--format", form, "-o", f"made.{form}")
    assert status == 2
    assert f"--format {form}: AMCT's formats have no weight scale per output channel" in err
    assert "for a Linear: 'net.4'. Give --format yaml" in " ".join(err.split())
    assert not (folder / f"made.{form}").exists()
    (folder / "choices.yaml").write_text("{weights: {channel_wise: true}, skip_layers: [net.4]}")
    assert folder(*MODEL, "--choices", "choices.yaml", "--format", form, "-o", f"made.{form}").status == 0
    load_config(f"made.{form}").resolve({"net.0": nn.Conv2d(1, 4, 3), "net.4": nn.Linear(4, 3)})


@pytest.mark.parametrize("form", ["json", "cfg"])
@pytest.mark.parametrize("key", ["weights.init", "activations.init"])
def test_amct_s_formats_cannot_say_where_scales_and_ranges_start(folder: Folder, form: str, key: str) -> None:
    section, name = key.split(".")
    (folder / "choices.yaml").write_text(f"layers: {{net.0: {{{section}: {{{name}: {START[section]}}}}}}}")
    status, _, err = folder(*MODEL, "--choices", "choices.yaml", "--format", form, "-o", f"made.{form}")
    assert status == 2
    assert f"no choice of where scales and ranges start: {key} of 'net.0'. Give --format yaml" in " ".join(err.split())
    assert not (folder / f"made.{form}").exists()


START = {"weights": "mse", "activations": "percentile"}


def test_yaml_says_where_scales_start() -> None:
    layers: dict[str, nn.Module] = {"1": nn.Linear(64, 8), "2": nn.Linear(64, 8)}
    complete = parse_choices(
        {"weights": {"algo": "ulq_retrain", "init": "mse"}, "activations": {"init": "percentile"}}
    ).resolve(layers)
    text = to_yaml(in_few_words(complete, layers))
    assert "init: mse" in text and "init: percentile" in text
    assert parse_choices(parse_yaml(text, "yaml")).resolve(layers) == complete


def test_yaml_says_that_weights_have_groups() -> None:
    layers: dict[str, nn.Module] = {"0": nn.Conv2d(4, 8, 1), "1": nn.Linear(64, 8), "2": nn.Linear(64, 8)}
    raw = {"weights": {"dst_type": "INT4", "group_size": 32}, "layers": {"2": {"weights": {"dst_type": "INT8"}}}}
    complete = parse_choices(raw).resolve(layers)
    text = to_yaml(in_few_words(complete, layers))
    assert "group_size: 32" in text
    assert parse_choices(parse_yaml(text, "yaml")).resolve(layers) == complete


def test_yaml_says_it_and_an_export_for_the_compiler_is_refused(folder: Folder) -> None:
    (folder / "choices.yaml").write_text(BY_CHANNEL)
    assert folder(*MODEL, "--choices", "choices.yaml", "--format", "yaml", "-o", "made.yaml").status == 0
    run = folder.run_yaml(trainer={"enable_checkpointing": True, "max_epochs": 1})
    assert folder("fit", "--config", run, "--quant.config", "made.yaml").status == 0
    (checkpoint,) = folder.path.rglob("*.ckpt")
    assert len(QuantRecord.load(folder / "record.txt")["net.4"].scale_w) == 3
    export = ("export", str(checkpoint), "--model", "demo_module.Classifier", "--output", "out/", "--form")
    status, _, err = folder(*export, "deploy")
    assert status == 2
    assert "The form 'deploy' has no weight scale per output channel" in err
    assert not list(folder.path.glob("out/*"))
    assert folder(*export, "qdq").status == 0


def test_explain_says_why_layers_stay_in_float(folder: Folder) -> None:
    shapes = ("--input-shape", "ids=2,5:int64", "--input-shape", "mask=2,5")
    status, out, _ = folder("config", "--model", "demo_module.Words", *shapes, "--explain")
    assert status == 0
    table = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha()}
    assert "A8W8 ARQ" in table["dense"]
    assert "float" in table["unused"]
    assert "never called with the given input_data" in table["unused"]
    assert "version" not in out  # without -o, the table alone


def test_an_existing_file_is_replaced_only_by_force(folder: Folder) -> None:
    (folder / "config.json").write_text("mine")
    status, _, err = folder(*MODEL, "-o", "config.json")
    assert status == 2
    assert "'config.json' exists. Give another path, or --force to replace it." in err
    assert (folder / "config.json").read_text() == "mine"
    assert folder(*MODEL, "-o", "config.json", "--force").status == 0
    assert list(load_config("config.json").layers) == ["net.0", "net.4"]


@pytest.mark.parametrize(
    "spelling", [["--model.width=2"], ["--model.width", "2"], ["--model.init_args.width=2"], ["--init-arg", "width=2"]]
)
def test_arguments_of_the_class_have_several_spellings(folder: Folder, spelling: list[str]) -> None:
    torch.save({"state_dict": _state(folder, width=2)}, "float.ckpt")
    assert folder(*MODEL, *spelling, "--ckpt", "float.ckpt").status == 0
    assert folder(*MODEL, "--ckpt", "float.ckpt").status == 2


def test_the_model_of_a_run_is_taken_from_its_yaml(folder: Folder) -> None:
    run = folder.run_yaml(model={"class_path": "demo_module.Classifier", "init_args": {"width": 2}})
    torch.save(_state(folder, width=2), "float.pth")
    assert folder("config", "--model", run, "--ckpt", "float.pth", "--submodule", "net", "--format", "yaml").out == (
        "# What is quantized in Sequential. Its layers that can be:\n"
        "#   0  Conv2d\n"
        "#   4  Linear\n"
        "batch_num: 1\n"
        "activations: {dst_type: INT8}\n"
        "weights: {algo: arq_retrain, dst_type: INT8}\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-shape", "1,x"], "--input-shape 1,x: must be like 1,3,32,32"),
        (["--input-shape", "1,2:int63"], "there is no dtype 'int63'"),
        (["--input-shape", "x=1,1,8,8", "--input-shape", "1"], "give a name of its own to all inputs, or to none"),
        (["--input-shape", "1,3,8,8"], "Classifier failed on the given input_data"),
        (["--model.depth=2"], "Option 'depth' is not accepted"),
        (["--init-arg", "width"], "--init-arg width: must be key=value"),
        (["--submodule", "body"], "has no such module; its children are 'net'"),
        (["--choices", "no.yaml"], "No such config file"),
        (["--choices", "INT2"], "Neither a preset"),
        (["--ckpt", "demo_module.py"], "cannot be read as a checkpoint"),
        (["--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_what_is_wrong_is_said(folder: Folder, options: list[str], message: str) -> None:
    status, _, err = folder(*MODEL, *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_a_model_without_example_input_needs_a_shape(folder: Folder) -> None:
    assert "--input-shape 1,3,32,32" in folder("config", "--model", "demo_module.Words").err


@pytest.mark.parametrize(
    ("text", "name", "shape", "dtype"),
    [
        ("1,3,8,8", None, (1, 3, 8, 8), torch.float32),
        ("ids=1,128:int64", "ids", (1, 128), torch.int64),
        ("2 , 4 : bool", None, (2, 4), torch.bool),
        (":int32", None, (), torch.int32),
    ],
)
def test_shapes(text: str, name: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found, tensor = make_tensor(text)
    assert (found, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype)


def _state(folder: Folder, width: int) -> dict[str, torch.Tensor]:
    module = runpy.run_path(str(Path(folder.path, "demo_module.py")))
    return dict(module["Classifier"](width).state_dict())
