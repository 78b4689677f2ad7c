"""Layers that read the same tensor share a quantizer; what safetensors and save_pretrained make of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

from amct_lightning import calibrate, prepare_qat

IDS = torch.arange(8).view(2, 4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.key(x).T


def bert() -> PreTrainedModel:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=9, max_position_embeddings=8, **size))


def test_save_model_writes_what_save_file_refuses_and_load_state_dict_reads_it(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    saved, again = (prepare_qat(Attention(), None, x) for _ in range(2))
    calibrate(saved, [x])
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(saved.state_dict(), tmp_path / "qat.safetensors")
    save_model(saved, str(tmp_path / "qat.safetensors"))
    again.load_state_dict(load_file(tmp_path / "qat.safetensors"))
    assert torch.equal(again.eval()(x), saved.eval()(x))
    assert again.query.input_quantizer is again.key.input_quantizer


def test_save_pretrained_takes_a_state_dict_of_copies(tmp_path: Path) -> None:
    saved, again = (prepare_qat(bert(), None, {"input_ids": IDS}) for _ in range(2))
    calibrate(saved, [{"input_ids": IDS}])
    with pytest.raises(RuntimeError, match="shared tensors"):
        saved.save_pretrained(tmp_path)
    saved.save_pretrained(tmp_path, state_dict={name: tensor.clone() for name, tensor in saved.state_dict().items()})
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    pooled = [model.eval()(input_ids=IDS).pooler_output for model in (again, saved)]
    assert torch.equal(*pooled)
