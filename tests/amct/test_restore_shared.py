"""AMCT's .pth files of models whose layers share a quantizer: by names written down as AMCT gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amct_lightning as amct
from amct_lightning import QuantRecord, RetrainConfig
from amct_lightning.config import DataConfig, LayerConfig, WeightConfig


def settings(data: str, weights: str) -> LayerConfig:
    return LayerConfig(True, DataConfig(dst_type=data), WeightConfig(dst_type=weights))


INT4, MIXED, INT8 = settings("INT4", "INT4"), settings("INT8", "INT4"), settings("INT8", "INT8")


class Readers(nn.Module):
    """Two layers and what each of them makes of the input before it reads it."""

    def __init__(self, a: nn.Module, b: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.a, self.b, self.before = a, b, before

    def forward(self, x: Tensor) -> Any:
        return self.a(self.before(x)), self.b(self.before(x))


def amct_s_state(layers: dict[str, nn.Module], clips: dict[str, float]) -> dict[str, Tensor]:
    """Convolutions and linear layers after 100 steps in AMCT; of layers without clips another one has the quantizer."""
    state = {}
    for name, layer in layers.items():
        scales = layer.weight.shape[0] if isinstance(layer, nn.Conv2d) else 1
        inside = {"wts_scales": torch.full((scales,), 0.1), "wts_offsets": torch.zeros(scales)}
        inside |= {"cur_batch": torch.tensor(100.0), "prune_cur_batch": torch.tensor(0.0)}
        inside |= {"s_rec_flag": torch.tensor(0.0)}
        if name in clips:
            clip = torch.tensor(clips[name])
            inside |= {"acts_clip_max": clip, "acts_clip_min": -clip}
            inside |= {"acts_clip_max_pre": clip, "acts_clip_min_pre": -clip}
            inside |= {"acts_scale": clip / 127, "acts_offset": torch.tensor(0.0)}
        inside |= {f"replaced_module.{key}": value for key, value in layer.state_dict().items()}
        state |= {f"{name}.quant_module.{key}": value for key, value in inside.items()}
        state |= {f"{name}.scale_w": torch.ones(scales), f"{name}.offset_w": torch.zeros(scales)}
        state[f"{name}.record_module.quant_layer_num"] = torch.tensor(float(len(layers)))
    return state


def restore(folder: Path, model: Readers, config: RetrainConfig, x: Tensor, clips: dict[str, float]) -> Any:
    config.to_json(folder / "config.json")
    torch.save(amct_s_state({"a": model.a, "b": model.b}, clips), folder / "amct.pth")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*INT8 is used instead of INT4.*")
        paths = [str(folder / name) for name in ("config.json", "record.txt", "amct.pth")]
        return amct.restore_quant_retrain_model(paths[0], model, paths[1], x, paths[2])


IMAGE = torch.linspace(-1, 1, 64).view(1, 4, 4, 4)


def conv(groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, groups=groups)


@pytest.mark.parametrize("first", [INT4, MIXED], ids=["a4w4", "a8w4"])
def test_different_settings_do_not_share_whatever_becomes_of_int4(tmp_path: Path, first: LayerConfig) -> None:
    config = RetrainConfig(layers={"a": first, "b": INT8})
    model = restore(tmp_path, Readers(conv(2), conv()), config, IMAGE, {"a": 0.5, "b": 0.75})
    assert model.a.input_quantizer is not model.b.input_quantizer
    assert (model.a.input_quantizer.num_bits, model.a.weight_quantizer.num_bits) == (8, 8)
    assert (float(model.a.input_quantizer.clip_max), float(model.b.input_quantizer.clip_max)) == (0.5, 0.75)


def test_equal_settings_share_although_one_of_them_gets_int8_weights(tmp_path: Path) -> None:
    config = RetrainConfig(layers={"a": MIXED, "b": MIXED})
    model = restore(tmp_path, Readers(conv(2), conv()), config, IMAGE, {"a": 0.5})
    assert model.a.input_quantizer is model.b.input_quantizer
    assert (model.a.weight_quantizer.num_bits, model.b.weight_quantizer.num_bits) == (8, 4)


@pytest.mark.parametrize("groups", [(2, 1), (1, 2)])
def test_int4_activations_that_only_one_layer_can_have_begin_from_one_range(
    tmp_path: Path, groups: tuple[int, int]
) -> None:
    """AMCT has one quantizer of four bits there; no quantizer has two numbers of bits."""
    config = RetrainConfig(layers={"a": INT4, "b": INT4})
    model = restore(tmp_path, Readers(*map(conv, groups)), config, IMAGE, {"a": 0.5})
    for layer, number in ((model.a, groups[0]), (model.b, groups[1])):
        assert layer.input_quantizer.num_bits == (4 if number == 1 else 8)
        assert float(layer.input_quantizer.clip_max) == 0.5
        assert not layer.input_quantizer.calibrating
    with torch.no_grad():
        model.eval()(IMAGE)
    record = QuantRecord.load(tmp_path / "record.txt")
    assert {record["a"].act_type, record["b"].act_type} == {"INT4", "INT8"}


@pytest.mark.parametrize("before", [F.relu, lambda x: x * 2, lambda x: x.transpose(2, 3)])
def test_equal_operators_on_one_value(tmp_path: Path, before: Callable[[Tensor], Tensor]) -> None:
    config = RetrainConfig(layers={"a": INT8, "b": INT8})
    model = restore(tmp_path, Readers(conv(), conv(), before), config, IMAGE, {"a": 0.5})
    assert float(model.b.input_quantizer.clip_max) == 0.5


def test_a_cfg_file_is_written_down_with_int4_already_raised(tmp_path: Path) -> None:
    """As in AMCT, where sharing is decided on the JSON file that is made of it."""
    cfg = tmp_path / "simple.cfg"
    cfg.write_text(
        "retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }"
        'override_layer_configs { layer_name: "b" retrain_weight_quant_config { arq_retrain { dst_type: INT8 } } }'
    )
    model = Readers(conv(2), conv())
    with pytest.warns(UserWarning, match="INT8 is used instead of INT4 for 'a'"):
        config = RetrainConfig.from_simple_config(cfg, model, IMAGE)
    with pytest.warns(UserWarning, match="INT8 is used instead of INT4 for 'a'"):
        direct = amct.prepare_qat(model, str(cfg), IMAGE)
    restored = restore(tmp_path, model, config, IMAGE, {"a": 0.5})
    for converted in (direct, restored):
        assert converted.a.input_quantizer is converted.b.input_quantizer
