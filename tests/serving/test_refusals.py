"""What cannot be written or read is refused before anything is, with the file, layer or tensor and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amct_lightning import load_serving, prepare_qat, save_serving, verify_serving
from tests.serving.networks import FLOAT_HEAD, TOKENS, converted, decoder, logits, source

WEIGHTS, DESCRIPTION = "quant_model_weights.safetensors", "quant_model_description.json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = converted(decoder())
    return model, save_serving(model, tmp_path_factory.mktemp("serving") / "served")


def changed(folder: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, into)
    tensors = load_file(into / WEIGHTS)
    change(tensors)
    save_file(tensors, into / WEIGHTS)
    return into


def test_a_model_that_was_not_converted_for_servers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM is not converted.*target='serving'"):
        save_serving(decoder(), tmp_path / "served")
    with pytest.raises(ValueError, match=r"converted without a target, so it computes as no server does.*target='serv"):
        save_serving(prepare_qat(decoder(), FLOAT_HEAD, TOKENS), tmp_path / "served")
    with pytest.raises(ValueError, match="is not calibrated yet"):
        save_serving(prepare_qat(decoder(), FLOAT_HEAD, TOKENS, target="serving"), tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_format_does_not_have(tmp_path: Path) -> None:
    config = {**FLOAT_HEAD, "layers": {"*.o_proj": {"activations": {"dst_type": "INT16"}}}}
    with pytest.warns(UserWarning, match="INT16"):
        model = prepare_qat(decoder(), config, TOKENS, target="serving", on_unsupported="warn")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.o_proj'.* is not\. Give it such settings"):
        save_serving(model, tmp_path / "served")
    assert not list(tmp_path.iterdir())


def test_the_folder_of_another_network(tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    other = source(decoder(hidden_size=32), tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"folder of another network: its config\.json has hidden_size 32 where the mo"
    ):
        save_serving(served[0], tmp_path / "served", hf_source=other)
    with pytest.raises(ValueError, match=r"model_type 'llama' where the model has 'qwen2'"):
        save_serving(served[0], tmp_path / "served", hf_source=source(decoder("Llama"), tmp_path / "llama"))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*nothing is downloaded"):
        save_serving(served[0], tmp_path / "served", hf_source="Qwen/Qwen2-0.5B")
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is no valid JSON"):
        save_serving(served[0], tmp_path / "served", hf_source=other)
    assert not (tmp_path / "served").exists()


def test_a_link_that_leaves_the_folder(tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    (tmp_path / "secret").write_text("of value")
    files = source(decoder(), tmp_path / "float")
    (files / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab\.txt' is a link to '.*secret', outside of its folder"):
        save_serving(served[0], tmp_path / "served", hf_source=files)
    assert not (tmp_path / "served").exists()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1f").write_text("a")  # as a hub keeps what it has downloaded
    (tmp_path / "snapshots").mkdir()
    files = files.rename(tmp_path / "snapshots" / "main")
    (files / "vocab.txt").unlink()
    (files / "vocab.txt").symlink_to("../../blobs/1f")
    assert (save_serving(served[0], tmp_path / "served", hf_source=files) / "vocab.txt").read_text() == "a"


def test_a_folder_that_holds_something_else(tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    (tmp_path / "mine.txt").write_text("of value")
    with pytest.raises(ValueError, match=r"holds other files and no quant_model_description\.json"):
        save_serving(served[0], tmp_path)
    with pytest.raises(ValueError, match="is a file; a checkpoint for servers is a folder"):
        save_serving(served[0], tmp_path / "mine.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_earlier_checkpoint_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    first, second = converted(decoder(seed=1)), converted(decoder(seed=2))
    folder = save_serving(first, tmp_path / "served", largest_file=2000)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "broken").mkdir()
    with pytest.raises(FileNotFoundError):
        save_serving(second, folder, hf_source=tmp_path / "broken")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save_serving(second, folder)
    assert sorted(file.name for file in folder.glob("*.safetensors*")) == [WEIGHTS]
    assert torch.equal(logits(load_serving(folder)), logits(second))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_write_that_fails_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: tuple[nn.Module, Path]
) -> None:
    folder = save_serving(converted(decoder(seed=1)), tmp_path / "served")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_serving(served[0], folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize(
    ("form", "size", "message"),
    [
        ("gguf", 10, r"form='gguf'\): must be 'ascend_v1'"),
        ("ascend_v1", 0, r"largest_file=0\): must be a number of byt"),
    ],
)
def test_arguments(form: Any, size: int, message: str, tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ValueError, match=message):
        save_serving(served[0], tmp_path / "served", form, largest_file=size)


def _description(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / DESCRIPTION
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / DESCRIPTION).unlink(), r"has no quant_model_description\.json"),
        (lambda folder: (folder / DESCRIPTION).write_text("[" * 100000), r"is no valid JSON|maximum recursion"),
        (lambda folder: (folder / DESCRIPTION).write_text("[]"), "must hold a JSON object, found list"),
        (_description("version", "2.0.0"), r"key 'version' must be '1\.0\.0', found '2\.0\.0'"),
        (_description("lm_head.weight", "W3A3"), r"allowed are the types .*'lm_head\.weight': 'W3A3'"),
        (_description("lm_head.weight", ["W8A8"]), r"allowed are the types .*'lm_head\.weight': \['W8A8'\]"),
        (_description("lm_head.extra", "FLOAT"), r"lists 'lm_head\.extra', which no file has"),
        (lambda folder: (folder / WEIGHTS).unlink(), rf"lacks the file '{WEIGHTS}'"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "is damaged"),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../secret"}}'),
            r"names the file '\.\./\.\./secret', which is not in its folder",
        ),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": [1]}'), "'weight_map' must map"),
    ],
)
def test_damaged_files(
    damage: Callable[[Path], Any], message: str, tmp_path: Path, served: tuple[nn.Module, Path]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(served[1], folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_serving(folder)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].int()}),
            rf"'{Q}\.weight' must be int8 of shape \(16, 16\)",
        ),
        (
            lambda t: t.update({f"{Q}.deq_scale": t[f"{Q}.deq_scale"][:3].clone()}),
            rf"'{Q}\.deq_scale' must be float32 or",
        ),
        (
            lambda t: t.update({f"{Q}.input_scale": torch.ones(2)}),
            rf"'{Q}\.input_scale' must be float32 of shape \(1,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"'model\.norm\.weight' has the shape \(3,\), in the",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lists 'lm_head\.weight', which no file has"),
        (lambda t: t.update({"more": torch.ones(1)}), "does not list 'more', which the files have"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path, served: tuple[nn.Module, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_serving(changed(served[1], tmp_path / "changed", change))


def test_a_float_network_of_another_shape(served: tuple[nn.Module, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"layer '.*q_proj' has the shape \(16, 16\), in Qwen2ForCausalLM it is \(32, 32\)"
    ):
        load_serving(served[1], decoder(hidden_size=32))
    with pytest.raises(ValueError, match=r"quantized layer 'model\.layers\.1\..*has no such layer"):
        load_serving(served[1], decoder(num_hidden_layers=1))


@pytest.mark.parametrize("part", ["weight", "input_scale", "input_offset", "deq_scale", "quant_bias", "bias"])
@pytest.mark.parametrize("layer", ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"])
def test_a_changed_number_is_found_and_its_layer_named(
    part: str, layer: str, tmp_path: Path, served: tuple[nn.Module, Path]
) -> None:
    if part == "bias" and "mlp" in layer:
        part = "weight"

    def change(tensors: dict[str, Any]) -> None:
        tensor = tensors[f"{layer}.{part}"].view(-1)
        tensor[0] = tensor[0] * 2 + 1

    report = verify_serving(served[0], changed(served[1], tmp_path / "changed", change), [TOKENS])
    assert not report.ok
    assert report.first_departure is not None and report.first_departure.layer == layer
    assert f"First departure: layer '{layer}'" in str(report)
    assert json.loads(report.to_json())["first_departure"]["layer"] == layer


def test_a_changed_float_part_is_found(tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    folder = changed(served[1], tmp_path / "changed", lambda t: t["model.norm.weight"].mul_(2))
    report = verify_serving(served[0], folder, [TOKENS])
    assert [str(one) for one in report.departures] == [
        "layer 'model.norm': weight in the checkpoint is not what the model has"
    ]


def test_verifying_needs_batches(served: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ValueError, match="got no batches"):
        verify_serving(*served, [])


def test_what_other_writers_add_is_no_harm(tmp_path: Path, served: tuple[nn.Module, Path]) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[f"{Q}.weight_scale"] = torch.ones(16, 1)
        tensors[f"{Q}.weight_offset"] = torch.zeros(16, 1)

    folder = changed(served[1], tmp_path / "changed", add)
    _description(f"{Q}.weight_scale", "W8A8")(folder)
    _description(f"{Q}.weight_offset", "W8A8")(folder)
    _description("kv_quant_type", "C8")(folder)
    (folder / WEIGHTS).rename(folder / "quant_model_weights_w8a8.safetensors")
    assert torch.equal(logits(load_serving(folder)), logits(served[0]))
