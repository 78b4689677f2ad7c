"""A tiny Qwen2 in bfloat16 and float16: what it evaluates after training is what the server computes, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from amct_lightning import prepare_qat, quantized_layers
from amct_lightning.modules.grid.codes import activation_codes
from tests.modules.grid import server

WORDS = 50


def decoder(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": WORDS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.Qwen2Config(**sizes, **heads, tie_word_embeddings=False, use_cache=False)
    model: Any = transformers.Qwen2ForCausalLM(config)
    for name, bias in model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(bias)
    return model.to(dtype)


def logits(model: Any, words: Tensor) -> Tensor:
    found: Tensor = model(input_ids=words).logits
    return found


def trained(model: Any, words: Tensor, **options: Any) -> Any:
    choices = {"batch_num": 1, "skip_layers": ["lm_head"]}
    qat = prepare_qat(model, choices, {"input_ids": words}, target="serving", **options).train()
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        y = logits(qat, words).float()
        nn.functional.cross_entropy(y[:, :-1].reshape(-1, WORDS), words[:, 1:].reshape(-1)).backward()
        optimizer.step()
    return qat.eval()


class ServerLinear(nn.Module):
    """A linear layer of a server, from the learned clips and the trained weight of a quantized one."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        upper, lower = (float(clip) for clip in layer.input_quantizer.usable_clips())
        self.scale, self.offset = server.input_factors(upper, lower, dtype)
        scale_w, self.codes_w = server.weight_factors(server.array(layer.weight))
        self.deq = server.deq_scale(self.scale, scale_w)
        bias = None if layer.bias is None else server.array(layer.bias)
        self.added = server.quant_bias(bias, self.deq, self.codes_w, self.offset)
        self.codes: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.codes = server.input_codes(server.array(x, self.dtype), self.scale, self.offset)
        y = server.output(self.codes, self.codes_w, self.added, self.deq, self.dtype)
        return torch.from_numpy(y.astype(np.float32)).to(x.dtype)


def on_server(qat: Any, float_model: Any, dtype: torch.dtype) -> Any:
    """The float network with what was trained, its quantized layers replaced by those of a server."""
    served = copy.deepcopy(float_model).eval()
    served.load_state_dict({k: v for k, v in qat.state_dict().items() if "quantizer" not in k})
    for name, layer in quantized_layers(qat).items():
        served.set_submodule(name, ServerLinear(layer, dtype))
    return served


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_every_integer_are_those_of_the_server(dtype: torch.dtype) -> None:
    model, words = decoder(dtype), torch.randint(WORDS, (3, 12))
    with torch.enable_grad():
        qat = trained(model, words)
    layers: dict[str, Any] = dict(quantized_layers(qat))
    assert len(layers) == 14
    assert {layer.serving for layer in layers.values()} == {dtype}
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    served, x = on_server(qat, model, dtype), torch.randint(WORDS, (2, 9))
    y = logits(qat, x)
    assert y.dtype == dtype
    assert torch.equal(logits(served, x), y)
    for name, layer in layers.items():
        quantizer = layer.input_quantizer
        codes = activation_codes(quantizer, seen[name], *quantizer.usable_clips()).values + quantizer.offset
        assert np.array_equal(codes.numpy().astype(np.int64), served.get_submodule(name).codes)
    assert not torch.equal(logits(model.eval(), x), y)


@torch.no_grad()
def test_without_the_target_some_integers_are_others() -> None:
    """What the target is for: the same network, trained as AMCT trains, flips codes on a server."""
    model, words = decoder(torch.bfloat16), torch.randint(WORDS, (3, 12))
    qat = prepare_qat(model, {"weights": {"channel_wise": True}, "skip_layers": ["lm_head"]}, {"input_ids": words})
    qat.train()(input_ids=words)
    served = on_server(qat.eval(), model, torch.bfloat16)
    assert not torch.equal(logits(served, words), logits(qat, words))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_training_and_evaluation_give_the_same(precision: torch.dtype) -> None:
    words = torch.randint(WORDS, (3, 12))
    qat = trained(decoder(precision), words)
    with torch.no_grad():
        y = logits(qat, words)
        assert torch.equal(logits(qat.train(), words), y)
