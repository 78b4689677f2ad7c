"""A checkpoint in the form AscendV1: names, dtypes and shapes as documented, and the very numbers of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from amct_lightning import calibrate, load_serving, prepare_qat, quantized_layers, save_serving, verify_serving
from tests.serving.networks import FLOAT_HEAD, TOKENS, converted, decoder, logits, source

HALVES = [torch.bfloat16, torch.float16]
PROJECTIONS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    description = json.loads((folder / "quant_model_description.json").read_text())
    return load_file(folder / "quant_model_weights.safetensors"), description


def documented(dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
    """All tensors of the decoder, as the format is documented."""
    deq = torch.int64 if dtype == torch.float16 else torch.float32
    expected: dict[str, tuple[torch.dtype, tuple[int, ...], str]] = {
        "model.embed_tokens.weight": (dtype, (16, 16), "FLOAT"),
        "model.norm.weight": (dtype, (16,), "FLOAT"),
        "lm_head.weight": (dtype, (16, 16), "FLOAT"),
    }
    for block in ("model.layers.0.", "model.layers.1."):
        expected[f"{block}input_layernorm.weight"] = (dtype, (16,), "FLOAT")
        expected[f"{block}post_attention_layernorm.weight"] = (dtype, (16,), "FLOAT")
        for name, (n, k) in PROJECTIONS.items():
            expected[f"{block}{name}.weight"] = (torch.int8, (n, k), "W8A8")
            expected[f"{block}{name}.input_scale"] = (torch.float32, (1,), "W8A8")
            expected[f"{block}{name}.input_offset"] = (torch.float32, (1,), "W8A8")
            expected[f"{block}{name}.deq_scale"] = (deq, (n,), "W8A8")
            expected[f"{block}{name}.quant_bias"] = (torch.int32, (n,), "W8A8")
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                expected[f"{block}{name}.bias"] = (torch.float32, (n,), "FLOAT")
    return expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_tensors_have_the_documented_names_dtypes_and_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, description = read(save_serving(converted(decoder(dtype=dtype)), tmp_path / "served"))
    settings = {key: description.pop(key) for key in ("model_quant_type", "version", "group_size")}
    assert settings == {"model_quant_type": "W8A8", "version": "1.0.0", "group_size": 0}
    found = {name: (tensor.dtype, tuple(tensor.shape), description[name]) for name, tensor in tensors.items()}
    assert found == documented(dtype)
    assert description.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_numbers_follow_from_the_documented_formulas(dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(decoder(dtype=dtype))
    tensors, _ = read(save_serving(model, tmp_path / "served"))
    half: Any = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float16
    for name, layer in quantized_layers(model).items():
        weight, scale = tensors[f"{name}.weight"].numpy().astype(np.int64), tensors[f"{name}.input_scale"].numpy()
        assert (scale.astype(half).astype(np.float32) == scale).all()
        assert tensors[f"{name}.input_offset"].item() in range(-128, 128)
        deq = tensors[f"{name}.deq_scale"].numpy()
        if dtype == torch.float16:
            assert ((deq >> 32 == 0) & (deq & 0x1FFF == 0)).all()
            deq = (deq & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        whole = scale * layer.weight_quantizer.scale.detach().numpy()
        assert np.allclose(deq, whole, rtol=0 if dtype == torch.bfloat16 else 2.0**-10, atol=0)
        bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().numpy()
        expected = np.rint(bias.astype(np.float32) / deq) - weight.sum(1) * int(tensors[f"{name}.input_offset"].item())
        assert (tensors[f"{name}.quant_bias"].numpy() == expected).all()


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_read_back_gives_the_logits_of_the_model_to_the_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = converted(decoder(kind, dtype))
    folder = save_serving(model, tmp_path / "served")
    assert torch.equal(logits(load_serving(folder)), logits(model))
    report = verify_serving(model, folder, [TOKENS, {"input_ids": TOKENS[:1]}])
    assert report.ok and report.logits.equal == report.logits.rows == 32
    assert [row.codes_wrong + row.outputs_wrong for row in report.layers] == [0] * 14
    assert "The server computes what the model does." in str(report)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_that_was_cast_is_read_back_as_it_computes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(decoder(dtype=torch.float32).to(dtype))
    with pytest.warns(UserWarning, match=r"inv_freq'.* as model\.to\(\) leaves it; a server keeps it in float32"):
        folder = save_serving(model, tmp_path / "served")
    assert torch.equal(logits(load_serving(folder)), logits(model))


@pytest.mark.parametrize("target", ["serving", "serving_float16"])
def test_a_float32_model_is_served_in_half_precision(target: str, tmp_path: Path) -> None:
    model = converted(decoder(dtype=torch.float32), target=target)
    folder = save_serving(model, tmp_path / "served")
    report = verify_serving(model, folder, [TOKENS])
    assert report.ok and report.logits.equal == report.logits.rows
    assert report.dtype == {"serving": "bfloat16", "serving_float16": "float16"}[target]
    assert next(model.parameters()).dtype == torch.float32
    config = json.loads((folder / "config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {report.dtype}


def test_other_types_are_written_as_servers_know_them(tmp_path: Path) -> None:
    kinds = {"*.mlp.gate_proj": "per_token", "*.mlp.up_proj": "per_token", "*.mlp.down_proj": "none"}
    config = {**FLOAT_HEAD, "layers": {name: {"activations": {"algo": algo}} for name, algo in kinds.items()}}
    model = converted(decoder(), config)
    folder = save_serving(model, tmp_path / "served")
    tensors, description = read(folder)
    for name, kind, shape in (("gate_proj", "W8A8_DYNAMIC", (32, 16)), ("down_proj", "W8A16", (16, 32))):
        prefix = f"model.layers.1.mlp.{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in own.items()} == {
            "weight": (torch.int8, shape),
            "weight_scale": (torch.float32, (shape[0], 1)),
            "weight_offset": (torch.float32, (shape[0], 1)),
        }
        assert {description[prefix + key] for key in own} == {kind}
        assert not own["weight_offset"].any()
    assert description["model_quant_type"] == "W8A8"
    report = verify_serving(model, folder, [TOKENS])
    assert report.ok
    assert {row.kind for row in report.layers} == {"W8A8", "W8A8_DYNAMIC", "W8A16"}
    assert torch.allclose(logits(load_serving(folder)), logits(model), atol=0.05)


def test_one_scale_for_a_weight_is_repeated_for_each_channel(tmp_path: Path) -> None:
    model = converted(decoder(), {**FLOAT_HEAD, "weights": {"channel_wise": False}})
    folder = save_serving(model, tmp_path / "served")
    tensors, _ = read(folder)
    deq = tensors["model.layers.0.mlp.up_proj.deq_scale"]
    assert deq.shape == (32,) and len(deq.unique()) == 1
    assert verify_serving(model, folder, [TOKENS]).ok


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    model = converted(decoder(tie_word_embeddings=True))
    folder = save_serving(model, tmp_path / "served")
    tensors, _ = read(folder)
    assert "lm_head.weight" not in tensors
    server = load_serving(folder)
    assert server.lm_head.weight is server.model.embed_tokens.weight
    assert torch.equal(logits(server), logits(model))


def test_files_are_of_a_limited_size(tmp_path: Path) -> None:
    model = converted(decoder())
    folder = save_serving(model, tmp_path / "served", largest_file=2000)
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"quant_model_weights-00001-of-{len(files):05}.safetensors"
    found = {name: file for file in files for name in load_file(folder / file)}
    assert index["weight_map"] == found
    sizes = [t.numel() * t.element_size() for file in files for t in load_file(folder / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert torch.equal(logits(load_serving(folder)), logits(model))


def test_what_lies_beside_the_float_network_is_copied(tmp_path: Path) -> None:
    net = decoder()
    files = source(net, tmp_path / "float")
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}, "of_ours": 1}))
    folder = save_serving(converted(net), tmp_path / "served", hf_source=files)
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "quant_model_description.json",
        "quant_model_weights.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = json.loads((folder / "config.json").read_text())
    assert written["of_ours"] == 1 and "quantization_config" not in written


def test_a_network_of_another_kind_is_read_back_into_its_float_self(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(5, 8)
    model = prepare_qat(net.bfloat16(), None, x.bfloat16(), target="serving")
    calibrate(model, [x.bfloat16()])
    folder = save_serving(model.eval(), tmp_path / "served")
    assert not (folder / "config.json").exists()
    assert torch.equal(load_serving(folder, net)(x.bfloat16()), model(x.bfloat16()))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*load_serving\(folder, model\)"):
        load_serving(folder)


def test_the_network_inside_of_a_module_is_written_under_its_own_names(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder()

        def forward(self, input_ids: Tensor) -> Any:
            return self.net(input_ids=input_ids)

    model = converted(Holder(), {"skip_layers": ["net.lm_head"]})
    tensors, _ = read(save_serving(model, tmp_path / "served"))
    assert tensors.keys() == documented(torch.bfloat16).keys()
