"""What a server of language models would not load is refused before any training, with the layer and the remedy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from amct_lightning import prepare_qat, quantized_layers

TOKENS = torch.arange(6).view(1, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def decoder(kind: str = "Qwen2", **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "tie_word_embeddings": False, **settings})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def convert(model: nn.Module, config: Any = None, **arguments: Any) -> nn.Module:
    return prepare_qat(model, config, TOKENS, target="serving", **arguments)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Qwen3", "Mistral"])
def test_a_decoder_that_servers_know_is_converted(kind: str) -> None:
    model = convert(decoder(kind))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.input_quantizer is attention.k_proj.input_quantizer is attention.v_proj.input_quantizer
    assert len(quantized_layers(model)) == 15


def test_it_is_found_inside_of_another_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids=x).logits

    with pytest.raises(ValueError, match=r"'net\.model\.layers\.1\.mlp\.gate_proj', 'net\.model\.layers\.1\.mlp"):
        convert(Holder(), {"skip_layers": ["net.model.layers.1.mlp.up_proj"]})


@pytest.mark.parametrize(
    ("left_out", "fused"),
    [("model.layers.1.self_attn.k_proj", "qkv_proj"), ("model.layers.0.mlp.gate_proj", "gate_up_proj")],
)
def test_projections_that_are_fused_have_one_type(left_out: str, fused: str) -> None:
    parent = left_out.rpartition(".")[0]
    with pytest.raises(ValueError, match=rf"as one layer '{parent}\.{fused}', .*'{left_out}': FLOAT.*skip_layers"):
        convert(decoder(), {"skip_layers": [left_out]})
    names = "qkv" if fused == "qkv_proj" else ("gate", "up")
    together = convert(decoder(), {"skip_layers": [f"{parent}.{name}_proj" for name in names]})
    assert left_out not in quantized_layers(together)


def test_other_projections_may_differ() -> None:
    left_out = ["*.o_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert len(quantized_layers(convert(decoder(), {"skip_layers": left_out}))) == 11


def test_a_fused_projection_that_reads_another_tensor_has_another_scale() -> None:
    model = decoder()
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.qkv_proj', which has one input_scale, but"):
        convert(model)


def test_a_tied_head_stays_in_float() -> None:
    with pytest.raises(ValueError, match=r"'lm_head' .*: its weight is that of the embedding 'model\.embed_tokens'"):
        convert(decoder(tie_word_embeddings=True))
    with warnings.catch_warnings(record=True):
        model = convert(decoder(tie_word_embeddings=True), on_unsupported="fallback")
    assert "lm_head" not in quantized_layers(model)
    assert len(quantized_layers(model)) == 14


def test_what_sends_tokens_to_experts_stays_in_float() -> None:
    model = decoder("Qwen2Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"mlp\.shared_expert_gate' .*sends tokens to experts.*Leave the layers in f"):
        convert(model)
    rest = convert(model, {"skip_layers": ["*.shared_expert_gate"]})
    assert not any(name.endswith("gate") for name in quantized_layers(rest))


def test_a_network_that_servers_do_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is of model_type 'gpt2'.*Known are llama, mistral, qwen2"):
        convert(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2)))
    model = prepare_qat(decoder(), {"skip_layers": ["model.layers.1.self_attn.k_proj"]}, TOKENS)
    assert len(quantized_layers(model)) == 14  # without the target nothing is asked


def test_a_plain_network_has_nothing_to_fuse() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert len(quantized_layers(prepare_qat(net, None, torch.ones(1, 4), target="serving"))) == 2
